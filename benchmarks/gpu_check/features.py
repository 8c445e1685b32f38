"""The teacher's passes: how fast, how near the card's peak, and whether variants give what they should."""

import statistics
import time

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_check.scene import TIMESTEPS, Failed, NotHere, Scene
from pipeline.estimate.memory import meta_inputs
from pipeline.teachers import outline_teacher
from pipeline.teachers.diffusers_teacher import DiffusersTeacher
from pipeline.teachers.lora import add_lora
from pipeline.teachers.weightless import weightless_teacher

TAPS = ("hidden",)
LEAST_SHARE = 0.35  # of the peak, in plain bfloat16
# Dense bfloat16 in FLOP/s, as NVIDIA's data sheets have it without sparsity; the first that is part of the card's name.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("4090", 165e12),
    ("3090", 71e12),
)


def plain(scene: Scene) -> str:
    """As the weights were published: images a second and the share of the card's peak."""
    rate = _rate(scene, scene.teacher())
    share = _share_of_peak(scene, rate)
    if share is not None and share < LEAST_SHARE:
        raise Failed(f"{rate:.2f} images/s are {share:.0%} of the card's peak; {LEAST_SHARE:.0%} is the least")
    return f"{rate:.2f} images/s" + ("" if share is None else f", {share:.0%} of the card's peak")


def with_lora(scene: Scene) -> str:
    """With the adapters of Stage I beside every attention projection."""
    teacher = scene.teacher()
    add_lora(teacher.transformer, 16, seed=0)
    return f"{_rate(scene, teacher):.2f} images/s"


def int8(scene: Scene) -> str:
    """With 8-bit weights, whose features must stay near those of the weights they were made from."""
    noisy, given, sigma = scene.inputs(teacher := scene.teacher())
    exact = _features(teacher, noisy, given, sigma)[:2].float().cpu()
    del teacher
    scene.begin()
    teacher = scene.teacher(quantization="int8")
    near = _features(teacher, noisy, given, sigma)[:2].float().cpu()
    cosine = torch.cosine_similarity(exact.flatten(1), near.flatten(1)).min().item()
    if cosine < 0.99:
        raise Failed(f"the least cosine with the features of unquantised weights is {cosine:.4f}")
    return f"{_rate(scene, teacher):.2f} images/s, least cosine {cosine:.4f}"


def compiled(scene: Scene) -> str:
    """With compiled blocks, which must give what they gave."""
    if not scene.real:
        raise NotHere("compiling takes a minute on a CPU, and a compiler")
    noisy, given, sigma = scene.inputs(teacher := scene.teacher())
    before = _features(teacher, noisy, given, sigma).float().cpu()
    del teacher
    scene.begin()
    teacher = scene.teacher(compile=True)
    _check_near(before, _features(teacher, noisy, given, sigma).float().cpu(), 0.999)
    return f"{_rate(scene, teacher):.2f} images/s"


def offloaded(scene: Scene) -> str:
    """With blocks in main memory until they run; on the device there must be room for a few of them alone."""
    if not scene.real:
        raise NotHere("a CPU has nothing to offload to")
    noisy, given, sigma = scene.inputs(teacher := scene.teacher(), 1)
    before = _features(teacher, noisy, given, sigma).float().cpu()
    del teacher
    scene.begin()
    teacher, seconds = scene.teacher(offload=True), []
    for _ in range(3):  # the first pass shows the order of the blocks; from the second on, each is fetched ahead
        started = time.perf_counter()
        _check_near(before, _features(teacher, noisy, given, sigma).float().cpu(), 0.999)
        seconds.append(time.perf_counter() - started)
    if scene.peak_gb() > 12:
        raise Failed("the weights were on the device together")
    return f"the same features; the first pass took {seconds[0]:.2f} s, the next ones {max(seconds[1:]):.2f} s"


def _check_near(expected: Tensor, found: Tensor, least: float) -> None:
    cosine = torch.cosine_similarity(expected.flatten(1), found.flatten(1)).min().item()
    if not cosine >= least:
        raise Failed(f"other features: the least cosine is {cosine:.4f}")


def _features(teacher: DiffusersTeacher, noisy: Tensor, given: object, sigma: Tensor) -> Tensor:
    found = teacher.features(noisy, given.context, sigma, given.text, TAPS)["hidden"]  # type: ignore[attr-defined]
    if not found.isfinite().all():
        raise Failed("the features are not finite")
    return found


def _rate(scene: Scene, teacher: DiffusersTeacher) -> float:
    """Images a second, each at all timesteps in one pass; the first pass does not count."""
    noisy, given, sigma = scene.inputs(teacher)
    seconds = []
    for _ in range(scene.rounds + 1):
        scene.wait()
        started = time.perf_counter()
        _features(teacher, noisy, given, sigma)
        scene.wait()
        seconds.append(time.perf_counter() - started)
    return scene.images / statistics.median(seconds[1:])


def _share_of_peak(scene: Scene, rate: float) -> float | None:
    """None for a card whose peak is not known here, and for a CPU."""
    if not scene.real:
        return None
    name = torch.cuda.get_device_name(scene.device)
    peak = next((peak for part, peak in PEAKS if part in name), None)
    return None if peak is None else rate * _flops_of_an_image(scene) / peak


def _flops_of_an_image(scene: Scene) -> float:
    """Counted by PyTorch on the meta device: of one image at all timesteps, in one pass."""
    teacher = weightless_teacher(outline_teacher(scene.teacher_name), scene.dtype)
    conditions, noisy, sigma = meta_inputs(teacher, 1, TIMESTEPS)
    with FlopCounterMode(display=False) as counter:
        teacher.features(noisy, conditions.context, sigma, conditions.text, TAPS)
    return counter.get_total_flops()

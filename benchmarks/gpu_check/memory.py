"""Where memory is short: what was predicted, what is halved, and what is said."""

import torch

from benchmarks.gpu_check.features import TAPS
from benchmarks.gpu_check.scene import SIGMAS, TIMESTEPS, Failed, NotHere, Scene
from pipeline.build.config import BuildConfig
from pipeline.datasets import open_dataset
from pipeline.estimate.memory import build_phase
from pipeline.estimate.tensor_memory import FusedAttention, MemoryMeter
from pipeline.inputs.feature_source import NO_ROOM, Wanted, teacher_features
from pipeline.teachers import outline_teacher
from pipeline.teachers.passes import OutOfMemory, Passes, memory_errors
from pipeline.teachers.weightless import weightless_teacher

MOST_BEYOND = 0.15  # that a pass may need more, or less, than `dit-cache estimate --memory` says
SMALL_CARD = 24e9
CONTEXT = 1e9  # what CUDA itself and its libraries take of a card


def predicted(scene: Scene) -> str:
    """The peak of a build, as `dit-cache estimate --memory` has it, against the peak of a real pass."""
    config = BuildConfig(taps=TAPS, batch=scene.images)
    outline = weightless_teacher(outline_teacher(scene.teacher_name), scene.dtype)
    expected = build_phase(outline, config).total
    teacher = scene.teacher()
    noisy, given, sigma = scene.inputs(teacher)
    resident = sum(p.nbytes for p in teacher.transformer.parameters())
    if scene.real:
        scene.begin()
        teacher.features(noisy, given.context, sigma, given.text, TAPS)
        found = torch.cuda.max_memory_allocated(scene.device)
    else:  # live tensors are counted: a CPU's allocator does not tell
        with FusedAttention(), MemoryMeter([teacher.transformer]) as meter:
            teacher.features(noisy, given.context, sigma, given.text, TAPS)
        found = resident + meter.peak
    beyond = found / expected - 1
    if abs(beyond) > MOST_BEYOND:
        raise Failed(f"{found / 1e9:.2f} GB instead of {expected / 1e9:.2f} GB")
    return f"{expected / 1e9:.2f} GB predicted, {beyond:+.0%}"


def second_view(scene: Scene) -> str:
    """Memory that really runs out after the first view gives the features of a batch that was never cut."""
    teacher, said = scene.teacher(), list[str]()
    views = ("canonical", "hflip")
    samples = open_dataset("demo", None, scene.images).samples[: scene.images]
    _, given, _ = scene.inputs(teacher)
    wanted = Wanted(TAPS, views, SIGMAS)

    def compute() -> torch.Tensor:
        passes = Passes(scene.images, TIMESTEPS, adaptive=True, log=said.append)
        return teacher_features(teacher, samples, dict.fromkeys(views, given), wanted, passes)["hidden"]

    whole = compute()
    if said:
        raise Failed(f"the whole batch does not fit: {said[0]}")
    original, calls, hogs = teacher._forward, [], []

    def forward(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            hogs.append(_take_all(scene))
        try:
            return original(*arguments)
        except RuntimeError:
            hogs.clear()  # whoever took the memory ends
            raise

    teacher._forward = forward  # type: ignore[method-assign]
    cut = compute()
    if len(said) != 1:
        raise Failed(f"memory ran out {len(said)} times, not once")
    if cut.device.type != "cpu" or cut.shape != whole.shape:
        raise Failed(f"cut, the features are {tuple(cut.shape)} on {cut.device}")
    flat = (tokens.float().flatten(0, 2).flatten(1) for tokens in (whole, cut))
    cosine = torch.cosine_similarity(*flat).min().item()
    if cosine < 0.999:
        raise Failed(f"cut, the features are others: least cosine {cosine:.4f}")
    return f"went on with half, least cosine {cosine:.5f}"


def _take_all(scene: Scene) -> torch.Tensor | None:
    """Take the device's memory, so that the next pass really fails; a CPU is said to have none instead."""
    if not scene.real:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(scene.device)
    return torch.empty(max(0, free - (256 << 20)), dtype=torch.uint8, device=scene.device)


def small_card(scene: Scene) -> str:
    """FLUX.1 in bfloat16 does not fit a card of 24 GB and says so once, with what helps; in int8 it runs."""
    if not scene.real:
        raise NotHere("a part of a GPU's memory stands for a smaller card")
    total = torch.cuda.get_device_properties(scene.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (SMALL_CARD - CONTEXT) / total), scene.device)
    try:
        try:
            with memory_errors("while loading the diffusion transformer", NO_ROOM):
                scene.teacher()
            raise Failed("FLUX.1 in bfloat16 fitted, which it must not")
        except OutOfMemory as error:
            if "--quantize int8" not in str(error):
                raise Failed(f"the advice is not to quantise: {error}") from None
        scene.begin()
        teacher = scene.teacher(quantization="int8")
        samples = open_dataset("demo", None, scene.images).samples[: scene.images]
        _, given, _ = scene.inputs(teacher)
        passes = Passes(scene.images, TIMESTEPS, adaptive=True, log=lambda line: None)
        teacher_features(teacher, samples, {"canonical": given}, Wanted(TAPS, ("canonical",), SIGMAS), passes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, scene.device)
    return "refused in bfloat16 with the advice to quantise, runs in int8"

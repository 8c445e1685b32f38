"""The cheap job: one step of DiT-Distill, part by part, and its loss in float32 whatever surrounds it."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from benchmarks.gpu_check.scene import Failed, Scene
from cache_schema.devices import sound_gradients
from cache_schema.reading.batch import EncodedBatch
from trainer.data.batch import Batch
from trainer.data.features import FeatureShape
from trainer.device import autocast
from trainer.methods.gcd.method import TEACHER
from trainer.methods.method import Moment
from trainer.methods.registry import find_method
from trainer.methods.settings import make_config
from trainer.models.heads import drc_loss
from trainer.models.student import build_student
from trainer.training.optim import make_optimizer


@sound_gradients()
def step(scene: Scene) -> str:
    """ViT-B/16 with features of FLUX.1 as int8, a batch of 32: milliseconds of each part of a step."""
    if scene.real:
        rows, timesteps, tokens, channels, student = 32, 4, 1024, 3072, "vit_base_patch16_224"
    else:
        rows, timesteps, tokens, channels, student = 8, 2, 9, 64, "vit_tiny_patch16_224"
    sized = [] if scene.real else ["student.img_size=32", "student.patch_size=16", "student.depth=2"]
    config = make_config("paper", [f"student.name={student}", *sized], method="gcd", cache="", validation_classes=0.0)
    torch.manual_seed(0)
    network = build_student(config.student)
    shape = FeatureShape(tuple(range(timesteps)), tokens, channels, grid=(math.isqrt(tokens),) * 2)
    method = find_method("gcd")(config, network, 98, {TEACHER: shape}).to(scene.device)
    optimiser = make_optimizer(method, config.optim)
    payload = torch.randint(-127, 128, (rows, timesteps, tokens, channels), dtype=torch.int8)
    scale, channel = torch.rand(rows, timesteps, tokens) / 127, torch.rand(timesteps, channels) + 0.5
    encoded = EncodedBatch(payload, scale, channel, "int8")
    encoded = encoded.pin_memory() if scene.real else encoded
    images = torch.randint(0, 256, (rows, 3, network.input_size, network.input_size), dtype=torch.uint8)
    labels = torch.arange(rows) % 98
    parts = dict.fromkeys(("copy", "decode", "forward", "backward"), 0.0)
    for turn in range(scene.rounds + 1):
        clock = _clock(scene, parts if turn else {})
        with clock("copy"):
            moved = encoded.to(scene.device, non_blocking=True)
            seen, named = images.to(scene.device), labels.to(scene.device)
        with clock("decode"):
            features = moved.decode(device=scene.device)
        with clock("forward"), autocast(scene.device, config.precision, network):
            losses = method(Batch(seen, named, {}, {TEACHER: features}), Moment(turn, scene.rounds + 1))
        with clock("backward"):
            optimiser.zero_grad(set_to_none=True)
            losses["loss"].backward()
            optimiser.step()
        if not losses["loss"].isfinite():
            raise Failed(f"the loss of step {turn} is {losses['loss'].item()}")
    each = {name: seconds / scene.rounds for name, seconds in parts.items()}
    told = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in each.items())
    return f"{rows / sum(each.values()):.0f} images/s one after the other: {told}"


def _clock(scene: Scene, parts: dict[str, float]) -> Callable[[str], object]:
    @contextmanager
    def clock(name: str) -> Iterator[None]:
        scene.wait()
        started = time.perf_counter()
        yield
        scene.wait()
        if name in parts:
            parts[name] += time.perf_counter() - started

    return clock


def drc(scene: Scene) -> str:
    """The task loss under autocast, against float64."""
    generator = torch.Generator().manual_seed(0)
    embeddings, proxies = torch.randn(64, 4, 768, generator=generator), torch.randn(98, 768, generator=generator)
    labels = torch.arange(64) % 98
    cosines = F.normalize(embeddings.double(), dim=-1) @ F.normalize(proxies.double(), dim=-1).T
    exact = F.cross_entropy((cosines / 0.05).flatten(0, 1), labels.repeat_interleave(4)).item()
    with torch.autocast(scene.device.type, torch.bfloat16):
        found = drc_loss(embeddings.to(scene.device), labels.to(scene.device), proxies.to(scene.device), 0.05).item()
    if not abs(found - exact) < 1e-4:
        raise Failed(f"{found:.6f} instead of {exact:.6f}")
    return f"off by {abs(found - exact):.0e}"

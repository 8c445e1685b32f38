"""Stage I: steps with and without recomputed activations, and a run that goes on from what was saved."""

import json
import time
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu_check.scene import Failed, Scene
from cache_schema.devices import sound_gradients
from pipeline.refine.checkpoint import Progress, load_checkpoint, save_checkpoint
from pipeline.refine.config import RefineConfig
from pipeline.refine.loss import cdr_loss
from pipeline.teachers.lora import add_lora

IDENTITY = json.loads(json.dumps(asdict(RefineConfig()) | {"context": "joint", "quantization": None}))


class _Training:
    """Stage I of a teacher with random weights, on one image at noise levels that depend on the step."""

    def __init__(self, scene: Scene, recompute: bool) -> None:
        self.scene, self.teacher = scene, scene.teacher()
        add_lora(self.teacher.transformer, 16, seed=0)
        if recompute:
            self.teacher.transformer.enable_gradient_checkpointing()
        named = self.teacher.transformer.named_parameters()
        self.parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.optimiser = torch.optim.Adam(self.parameters.values(), lr=1e-4)
        _, self.given, _ = scene.inputs(self.teacher, 1, 1)

    def steps(self, first: int, last: int) -> list[float]:
        """The losses of these steps."""
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            noise = torch.randn(self.given.object.shape, generator=generator).to(self.given.object)
            sigma = torch.rand(1, generator=generator).to(self.scene.device)
            self.optimiser.zero_grad(set_to_none=True)
            with sound_gradients():
                loss = cdr_loss(self.teacher, self.given, noise, sigma)
                loss.backward()
            self.optimiser.step()
            losses.append(loss.item())
        broken = [name for name, parameter in self.parameters.items() if not parameter.isfinite().all()]
        if broken or not all(torch.isfinite(torch.tensor(losses))):
            raise Failed(f"losses {losses}, {len(broken)} of the LoRA's tensors are not finite")
        return losses


def kept(scene: Scene) -> str:
    """All activations of a step in memory."""
    return _timed(scene, recompute=False)


def recomputed(scene: Scene) -> str:
    """Activations computed again in the backward pass."""
    return _timed(scene, recompute=True)


def _timed(scene: Scene, recompute: bool) -> str:
    training = _Training(scene, recompute)
    before = [parameter.detach().clone() for parameter in training.parameters.values()]
    training.steps(0, 1)
    scene.wait()
    started = time.perf_counter()
    training.steps(1, _steps(scene))
    scene.wait()
    moved = sum(not torch.equal(b, p) for b, p in zip(before, training.parameters.values(), strict=True))
    if not moved:
        raise Failed("no weight of the LoRA has changed")
    return f"{(time.perf_counter() - started) / (_steps(scene) - 1):.3f} s a step"


def resumed(scene: Scene) -> str:
    """Two steps, a checkpoint, and on from it, against the same steps without a break."""
    whole = _losses(scene, lambda training: training.steps(0, _steps(scene)))

    def broken(training: _Training) -> list[float]:
        losses = training.steps(0, 2)
        save_checkpoint(scene.scratch / "lora", Progress(IDENTITY, step=2), training.parameters, training.optimiser)
        return losses

    def going_on(training: _Training) -> list[float]:
        found = load_checkpoint(scene.scratch / "lora", IDENTITY, training.parameters, training.optimiser)
        if found is None or found.step != 2:
            raise Failed(f"the checkpoint was not found: {found}")
        return training.steps(2, _steps(scene))

    parts = _losses(scene, broken) + _losses(scene, going_on)
    furthest = max(abs(a - b) for a, b in zip(whole, parts, strict=True))
    allowed = 1e-3 if scene.real else 0.0
    if furthest > allowed:
        raise Failed(f"the losses differ by {furthest:.1e}")
    return f"losses differ by {furthest:.1e}"


def _losses(scene: Scene, run: Any) -> list[float]:
    found = run(_Training(scene, recompute=True))
    scene.begin()
    return found


def _steps(scene: Scene) -> int:
    return 5 if scene.real else 3

"""What the checks work on: a device, a teacher with random weights in its published shape, and inputs for it."""

import gc
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from cache_schema.devices import choose_device, use_device
from pipeline.inputs.conditions import Conditions
from pipeline.teachers import outline_teacher
from pipeline.teachers.base import Quantization, TextEmbedding
from pipeline.teachers.diffusers_teacher import DiffusersTeacher, blocks_of
from pipeline.teachers.loading import compile_blocks
from pipeline.teachers.offloading import offload_transformer
from pipeline.teachers.quantization import quantize
from pipeline.teachers.weightless import weightless_teacher

SIGMAS = (0.8, 0.6, 0.4, 0.1)
TIMESTEPS = len(SIGMAS)


class Failed(Exception):  # noqa: N818 - a verdict, not an error
    """A check did not find what it must; the message says what it found."""


class NotHere(Exception):  # noqa: N818 - neither
    """What a check is about does not exist on this kind of machine."""


@dataclass
class Scene:
    """device: where everything runs. real: FLUX.1 at its real size in bfloat16; else the demo teacher's in float32."""

    device: torch.device
    title: str
    scratch: Path

    @property
    def real(self) -> bool:
        return self.device.type == "cuda"

    @property
    def images(self) -> int:
        """Of a batch."""
        return 5 if self.real else 1

    @property
    def rounds(self) -> int:
        """That are timed; a CPU's times say nothing."""
        return 3 if self.real else 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.real else torch.float32

    @property
    def teacher_name(self) -> str:
        return "flux-dev" if self.real else "demo"

    def begin(self) -> None:
        """Nothing of the check before is left in memory, and none of it counts."""
        gc.collect()
        if self.real:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.real:
            torch.cuda.synchronize(self.device)

    def peak_gb(self) -> float:
        """The most memory since `begin`: of the device, or that this process ever had."""
        if self.real:
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def teacher(
        self, *, quantization: Quantization | None = None, compile: bool = False, offload: bool = False
    ) -> DiffusersTeacher:
        """The family's own class with random weights, on the device; raises torch's error where they do not fit."""
        made = weightless_teacher(outline_teacher(self.teacher_name), self.dtype)
        made.device = self.device
        made.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        _place_ids(made)
        transformer, generator = made.transformer, torch.Generator(self.device).manual_seed(0)
        # Block by block, as weights are read from a disk: 8-bit weights must never need the room of 16-bit ones.
        for part in [*blocks_of(transformer), *transformer.children()]:
            if any(tensor.is_meta for tensor in part.parameters()):
                _materialise(part, self.device, generator)
                if quantization:
                    quantize(part, quantization)
                if offload:  # the same weights as on the device, where they are drawn a hundred times faster
                    part.to("cpu")
        _materialise(transformer, self.device, generator)
        if compile:
            compile_blocks(blocks_of(transformer))
        if offload:
            offload_transformer(transformer, blocks_of(transformer), self.device)
        return made

    def inputs(self, teacher: DiffusersTeacher, images: int | None = None, steps: int = TIMESTEPS) -> tuple[Any, ...]:
        """(noisy, conditions, sigma) of a batch: random latents and text, the same each time."""
        images, generator = images or self.images, torch.Generator().manual_seed(1)
        latents, config = teacher.tap_shape("velocity"), teacher.transformer.config

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        text = TextEmbedding(
            random(images, teacher.text_length, config.joint_attention_dim),
            random(images, config.get("pooled_projection_dim") or 0),
        )
        shape = (latents.tokens, latents.channels)
        conditions = Conditions(random(images, *shape), random(images, *shape), text)
        sigma = torch.tensor(SIGMAS[:steps]).repeat(images).to(self.device)
        return random(images * steps, *shape), conditions, sigma


def _materialise(module: torch.nn.Module, device: torch.device, generator: torch.Generator) -> None:
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = torch.empty(parameter.shape, device=device, dtype=parameter.dtype)
                fill = (
                    values.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else values.fill_(_rest(name))
                )
                part.register_parameter(name, torch.nn.Parameter(fill, requires_grad=False))


def _rest(name: str) -> float:
    """Scales of norms are 1, biases 0."""
    return 0.0 if name == "bias" else 1.0


def _place_ids(teacher: Any) -> None:
    from pipeline.teachers.flux import image_ids

    streams = [image_ids(*teacher.grid, stream=stream) for stream in (0, 1)]
    teacher._object_ids = streams[0].to(teacher.device, teacher.dtype)
    teacher._both_ids = torch.cat(streams).to(teacher.device, teacher.dtype)


def open_scene(name: str, scratch: Path) -> Scene:
    """The scene on a device; raises DeviceError."""
    device = choose_device(name)
    title = use_device(device)
    if device.type != "cuda":
        title = f"no GPU is used: the same checks at the demo teacher's size, on {device}"
    return Scene(device, title, scratch)

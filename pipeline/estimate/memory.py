"""What is in memory in each phase of the heavy job: weights counted and activations measured on the meta device."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from cache_schema.encoding.reduction import stored_tap
from cache_schema.format.card import format_bytes
from cache_schema.format.manifest import TapInfo
from cache_schema.writing.plan import choose_samples_per_shard
from pipeline.build.config import BuildConfig
from pipeline.build.encoding import encoding_of
from pipeline.estimate.tensor_memory import FusedAttention, MemoryMeter, module_bytes
from pipeline.inputs.conditions import Conditions
from pipeline.refine.config import LoraTargets
from pipeline.refine.loss import cdr_loss
from pipeline.teachers import TeacherOutline
from pipeline.teachers.base import ContextMode, Quantization, TeacherError, TextEmbedding
from pipeline.teachers.diffusers_teacher import DiffusersTeacher
from pipeline.teachers.encoder import EncoderArchitecture
from pipeline.teachers.lora import add_lora
from pipeline.teachers.quantization import is_available
from pipeline.teachers.weightless import META, weightless_teacher

_ADAM_MOMENTS = 2


@dataclass(frozen=True)
class MemorySettings:
    """How the teacher would be loaded. limit: bytes of the device; refine_batch: images per step of Stage I.

    context: None as the family was trained.
    """

    dtype: torch.dtype
    limit: int
    quantization: Quantization | None = None
    context: ContextMode | None = None
    rank: int = 16
    lora_targets: LoraTargets = "attention"
    refine_batch: int = 1


@dataclass(frozen=True)
class Phase:
    """What is resident at the peak of one phase: {what: bytes}, on the device and beside it in host memory."""

    name: str
    device: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.device.values())

    def as_json(self, limit: int) -> dict[str, Any]:
        """Plain JSON values; total and fits are about the device."""
        return {
            "name": self.name,
            "device": self.device,
            "host": self.host,
            "total": self.total,
            "fits": self.total <= limit,
        }


def memory_budget(outline: TeacherOutline, config: BuildConfig, settings: MemorySettings) -> dict[str, Any]:
    """Everything `dit-cache estimate --memory` says, as plain JSON values; sizes in bytes.

    Keys: `dtype`, `quantize`, `limit`, `components` ({name: class, parameters, bytes}), `phases` (name, device and host
    as {what: bytes}, total and fits for the device), `warnings`. Weights are exact. Activations are the peak of live
    tensors in one batch of the real classes; what the allocator rounds up and CUDA itself takes is not in them. Raises
    TeacherError if a configuration is missing.
    """
    if isinstance(outline.architecture, EncoderArchitecture):
        raise TeacherError(f"teacher {outline.source}: --memory is for diffusion transformers; leave it out")
    teacher = _teacher(outline, settings, settings.quantization)
    if config.batch == "auto":
        config = replace(config, batch=_auto_batch(teacher, config, settings.limit))
    phases = [
        text_phase(teacher),
        latents_phase(teacher),
        build_phase(teacher, config),
        *refine_phases(teacher, settings),
    ]
    return {
        "dtype": str(settings.dtype).removeprefix("torch."),
        "quantize": settings.quantization,
        "limit": settings.limit,
        "components": {name: _describe(module) for name, module in _modules(teacher).items()},
        "phases": [phase.as_json(settings.limit) for phase in phases],
        "warnings": _warnings(phases, outline, config, settings),
    }


def text_phase(teacher: DiffusersTeacher) -> Phase:
    """A caption to its embedding: all text encoders, and the activations of the one that needs most."""
    encoders = _text_encoders(teacher)
    weights = {f"{name}, {type(encoder).__name__}": module_bytes(encoder) for name, encoder in encoders.items()}
    activations = []
    for name, encoder in encoders.items():
        tokenizer = getattr(teacher.text_pipe, name.replace("text_encoder", "tokenizer"))
        tokens = min(tokenizer.model_max_length, teacher.caption_tokens)
        ids = torch.zeros(1, tokens, dtype=torch.long, device=META)
        # Of T5 the last hidden state is read, of the others several; the logits of a language model are not computed.
        run = partial(encoder.base_model, ids, output_hidden_states=encoder.config.model_type != "t5")
        activations.append(_measure(run, resident=[encoder]))
    return Phase("text", {**weights, "activations, 1 caption": max(activations)}, {})


def latents_phase(teacher: DiffusersTeacher) -> Phase:
    """An image to its latents: the VAE, whose decoder is loaded with it, and its encoder's activations."""
    side = teacher.resolution
    pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=META)
    activations = _measure(partial(teacher.encode_images, pixels), resident=[teacher.vae])
    device = {"vae": module_bytes(teacher.vae), f"activations, 1 image of {side}×{side}": activations}
    return Phase("latents", device, {})


def build_phase(teacher: DiffusersTeacher, config: BuildConfig) -> Phase:
    """The cache build: all timesteps of a batch of images in one pass that ends at the deepest tap."""
    conditions, noisy, sigma = meta_inputs(teacher, config.batch_images, len(config.timesteps))
    run = partial(teacher.features, noisy, conditions.context, sigma, conditions.text, config.taps)
    what = f"activations, {_count(config.batch_images, 'image')} × {_count(len(config.timesteps), 'timestep')}"
    device = {
        "transformer": module_bytes(teacher.transformer),
        what: _measure(run, resident=[teacher.transformer]),
    }
    return Phase("build", device, {"features of two shards": 2 * _shard_bytes(teacher, config)})


def refine_phases(teacher: DiffusersTeacher, settings: MemorySettings) -> tuple[Phase, Phase]:
    """Stage I first with all activations kept, then with gradient checkpointing."""
    return refine_phase(teacher, settings, recompute=False), refine_phase(teacher, settings, recompute=True)


def refine_phase(teacher: DiffusersTeacher, settings: MemorySettings, recompute: bool) -> Phase:
    """Stage I: a LoRA in float32 on the frozen transformer; forward and backward pass of one batch.

    recompute: with gradient checkpointing. The teacher is as it was afterwards.
    """
    frozen = module_bytes(teacher.transformer)
    trained = add_lora(teacher.transformer, settings.rank, seed=0, targets=settings.lora_targets)
    if recompute:
        # Autograd computes the blocks again on its own; there, too, attention is to be one operator.
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), FusedAttention()))
        teacher.transformer.enable_gradient_checkpointing(again)
    lora = module_bytes(teacher.transformer) - frozen
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)  # as in a second batch that accumulates
    gradients = [p.grad for p in trained if p.grad is not None]
    conditions, noise, sigma = meta_inputs(teacher, settings.refine_batch)

    def step() -> None:
        cdr_loss(teacher, conditions, noise, sigma).backward()

    device = {
        "transformer": frozen,
        f"LoRA of rank {settings.rank}": lora,
        "gradients": sum(g.nbytes for g in gradients),
        "moments of Adam": _ADAM_MOMENTS * lora,
        f"activations, {_count(settings.refine_batch, 'image')}": _measure(step, [teacher.transformer, *gradients]),
    }
    teacher.release("transformer")
    return Phase("refine" if recompute else "refine --no-gradient-checkpointing", device, {})


def _teacher(outline: TeacherOutline, settings: MemorySettings, kind: Quantization | None) -> DiffusersTeacher:
    return weightless_teacher(outline, settings.dtype, kind, settings.context)


def meta_inputs(
    teacher: DiffusersTeacher, images: int, steps: int = 1
) -> tuple[Conditions, torch.Tensor, torch.Tensor]:
    """On the meta device, conditions of a batch of images, and what differs in each of its `steps` rows: (B·T, …)."""
    config, dtype = teacher.transformer.config, teacher.dtype
    latents = teacher.tap_shape("velocity")
    shape = (latents.tokens, latents.channels)

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=META)

    text = TextEmbedding(
        tokens=empty(images, teacher.text_length, config.joint_attention_dim),
        pooled=empty(images, config.get("pooled_projection_dim") or 0),
    )
    conditions = Conditions(object=empty(images, *shape), context=empty(images, *shape), text=text)
    return conditions, empty(images * steps, *shape), torch.empty(images * steps, device=META)


def _measure(run: Callable[[], Any], resident: Sequence[Any]) -> int:
    """The most bytes alive while `run` runs, beside what is resident."""
    with FusedAttention(), MemoryMeter(resident) as meter, torch.set_grad_enabled(_trains(resident)):
        result = run()
        del result
    return meter.peak


def _trains(resident: Sequence[Any]) -> bool:
    return any(p.requires_grad for r in resident if isinstance(r, torch.nn.Module) for p in r.parameters())


def _shard_bytes(teacher: DiffusersTeacher, config: BuildConfig) -> int:
    """Bytes of a shard's features as the teacher computes them."""
    shapes = [teacher.tap_shape(tap) for tap in config.taps]
    encoding = encoding_of(config)
    taps = [TapInfo(name=s.name, tokens=s.tokens, channels=s.channels, grid=s.grid) for s in shapes]
    stored = [stored_tap(tap, encoding) for tap in taps]
    samples = config.samples_per_shard or choose_samples_per_shard(
        stored, encoding, len(config.views), len(config.timesteps), batch=config.batch_images
    )
    passes = len(config.views) * len(config.timesteps)
    return samples * passes * sum(s.tokens * s.channels for s in shapes) * teacher.dtype.itemsize


def _text_encoders(teacher: DiffusersTeacher) -> dict[str, Any]:
    names = [name for name in teacher.text_components if name.startswith("text_encoder")]
    found = {name: getattr(teacher.text_pipe, name) for name in names}
    return {name: encoder for name, encoder in found.items() if encoder is not None}


def _modules(teacher: DiffusersTeacher) -> dict[str, torch.nn.Module]:
    return {**_text_encoders(teacher), "vae": teacher.vae, "transformer": teacher.transformer}


def _describe(module: torch.nn.Module) -> dict[str, Any]:
    return {
        "class": type(module).__name__,
        "parameters": sum(p.numel() for p in module.parameters()),
        "bytes": module_bytes(module),
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _warnings(
    phases: Sequence[Phase], outline: TeacherOutline, config: BuildConfig, settings: MemorySettings
) -> list[str]:
    """A line for every phase that does not fit, with what to change."""
    return [
        f"{phase.name} needs {format_bytes(phase.total)} of the device's {format_bytes(settings.limit)}; "
        f"{_remedy(phase, outline, config, settings)}"
        for phase in phases
        if phase.total > settings.limit and "--" not in phase.name  # which is not what happens by default
    ]


def _remedy(phase: Phase, outline: TeacherOutline, config: BuildConfig, settings: MemorySettings) -> str:
    """The first change with which a phase fits, measured like the phase, as options to type."""
    given = settings.quantization
    kinds: list[Quantization | None] = [given] if given or not is_available() else [None, "int8"]
    for kind in kinds if phase.name in ("build", "refine") else []:
        teacher = _teacher(outline, settings, kind)
        option = f"--quantize {kind} " if kind != given else ""
        if phase.name == "refine":
            if refine_phase(teacher, settings, recompute=True).total <= settings.limit:
                return f"{option}would do"
            continue
        for batch in _halves(config.batch_images):
            if build_phase(teacher, replace(config, batch=batch)).total <= settings.limit:
                return f"{option}{f'--batch {batch} ' if batch != config.batch_images else ''}would do"
    if phase.name in ("latents", "refine"):
        return "a lower --resolution, or a smaller teacher"
    return "--offload would keep most of the weights in host memory"


def _auto_batch(teacher: DiffusersTeacher, config: BuildConfig, limit: int) -> int:
    """To how many images in a pass a build with --batch auto comes down."""
    batches = _halves(config.batch_images)
    fitting = (b for b in batches if build_phase(teacher, replace(config, batch=b)).total <= limit)
    return next(fitting, 1)


def _halves(batch: int) -> list[int]:
    return [batch >> n for n in range(batch.bit_length())]

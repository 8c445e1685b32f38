"""Teachers by name. A new family is one file that fulfils `base.Teacher` and one line in `_FAMILIES`."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.teachers.base import Teacher, TeacherError

if TYPE_CHECKING:
    import torch

__all__ = ["PRESETS", "Teacher", "TeacherError", "load_teacher"]

_DEMO_WEIGHTS = Path(__file__).parent / "demo_weights"


@dataclass(frozen=True)
class TeacherPreset:
    """Where a named teacher is found and the resolution (pixels) of its views."""

    source: str
    resolution: int


PRESETS = {
    "demo": TeacherPreset(str(_DEMO_WEIGHTS), 48),
    "flux-dev": TeacherPreset("black-forest-labs/FLUX.1-dev", 512),
    "flux-kontext": TeacherPreset("black-forest-labs/FLUX.1-Kontext-dev", 512),
    "flux2-klein": TeacherPreset("black-forest-labs/FLUX.2-klein-4B", 512),
    "flux2-klein-base": TeacherPreset("black-forest-labs/FLUX.2-klein-base-4B", 512),
    "sd35-medium": TeacherPreset("stabilityai/stable-diffusion-3.5-medium", 512),
    "sd35-large": TeacherPreset("stabilityai/stable-diffusion-3.5-large", 512),
}
_DEFAULT_RESOLUTION = 512

# Pipeline class named in model_index.json → the adapter that drives its transformer, imported when it is asked for.
_FAMILIES = {
    "FluxPipeline": "pipeline.teachers.flux:FluxTeacher",
    "FluxKontextPipeline": "pipeline.teachers.flux:FluxTeacher",
    "Flux2KleinPipeline": "pipeline.teachers.flux2:Flux2KleinTeacher",
    "StableDiffusion3Pipeline": "pipeline.teachers.sd3:StableDiffusion3Teacher",
}


def _quiet_libraries() -> None:
    """Leave the terminal to our own progress bars: no bar per loaded shard, no warning per truncated caption."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def load_teacher(
    spec: str,
    *,
    revision: str | None = None,
    lora: Path | None = None,
    resolution: int | None = None,
    dtype: "torch.dtype",
    device: str,
    guidance: float = 3.5,
) -> Teacher:
    """Load a teacher by preset name, diffusers folder or hub repository.

    Raises TeacherError if it cannot be found or downloaded, or is of no known family.
    """
    from pipeline.teachers.weights import locate

    _quiet_libraries()
    preset = PRESETS.get(spec)
    folder = locate(preset.source if preset else spec, revision)
    module, _, name = _adapter_of(folder, spec).partition(":")
    adapter = getattr(import_module(module), name)
    return adapter(
        folder,
        source=spec,
        revision=revision,
        resolution=resolution or (preset.resolution if preset else _DEFAULT_RESOLUTION),
        dtype=dtype,
        device=device,
        guidance=guidance,
        lora=lora,
    )


def _adapter_of(folder: Path, spec: str) -> str:
    """The entry of `_FAMILIES` for a diffusers folder."""
    index_file = folder / "model_index.json"
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        pipeline_class, transformer_class = index["_class_name"], index["transformer"][1]
    except (ValueError, KeyError, IndexError, TypeError):
        raise TeacherError(
            f"teacher {spec}: {index_file} names no transformer; it is not a diffusion transformer"
        ) from None
    if pipeline_class not in _FAMILIES:
        raise TeacherError(
            f"teacher {spec}: no adapter for {pipeline_class} with {transformer_class}; "
            f"known are {', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[pipeline_class]

"""Teachers by name. A new family is one file that fulfils `base.Teacher` and one line in `_FAMILIES`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.teachers.architecture import FLUX_1, Architecture, read_architecture
from pipeline.teachers.base import TapShape, Teacher, TeacherError

if TYPE_CHECKING:
    import torch

__all__ = ["PRESETS", "Teacher", "TeacherError", "TeacherOutline", "load_teacher", "outline_teacher"]

_DEMO_WEIGHTS = Path(__file__).parent / "demo_weights"


@dataclass(frozen=True)
class TeacherPreset:
    """Where a named teacher is found, the resolution (pixels) of its views, and its published architecture.

    architecture: None where the configuration is at hand.
    """

    source: str
    resolution: int
    architecture: Architecture | None = None


PRESETS = {
    "demo": TeacherPreset(str(_DEMO_WEIGHTS), 48),
    "flux-dev": TeacherPreset("black-forest-labs/FLUX.1-dev", 512, FLUX_1),
    "flux-kontext": TeacherPreset("black-forest-labs/FLUX.1-Kontext-dev", 512, FLUX_1),
}
_DEFAULT_RESOLUTION = 512


def _flux(folder: Path, **options: Any) -> Teacher:
    from pipeline.teachers.flux import FluxTeacher

    return FluxTeacher(folder, **options)


# Transformer class named in model_index.json → the adapter that drives it.
_FAMILIES = {"FluxTransformer2DModel": _flux}


@dataclass(frozen=True)
class TeacherOutline:
    """What is known of a teacher before it is loaded. origin: where that was read, in words."""

    source: str
    resolution: int
    origin: str
    architecture: Architecture

    def tap_shape(self, tap: str) -> TapShape:
        """Shape of a tap; raises TeacherError as the loaded teacher would."""
        return self.architecture.tap_shape(tap, self.resolution, self.source)


def outline_teacher(spec: str, *, revision: str | None = None, resolution: int | None = None) -> TeacherOutline:
    """Outline a teacher by preset name, diffusers folder or hub repository, without reading weights.

    Raises TeacherError if its configuration cannot be found or is of no known family.
    """
    preset = PRESETS.get(spec)
    side = resolution or (preset.resolution if preset else _DEFAULT_RESOLUTION)
    if preset and preset.architecture:
        return TeacherOutline(spec, side, "published architecture", preset.architecture)
    found = read_architecture(preset.source if preset else spec, revision)
    return TeacherOutline(spec, side, "configuration files", found)


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
    index_file = folder / "model_index.json"
    try:
        transformer_class = json.loads(index_file.read_text(encoding="utf-8"))["transformer"][1]
    except (ValueError, KeyError, IndexError, TypeError):
        raise TeacherError(
            f"teacher {spec}: {index_file} names no transformer; it is not a diffusion transformer"
        ) from None
    if transformer_class not in _FAMILIES:
        raise TeacherError(
            f"teacher {spec}: no adapter for {transformer_class}; known are {', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[transformer_class](
        folder,
        source=spec,
        revision=revision,
        resolution=resolution or (preset.resolution if preset else _DEFAULT_RESOLUTION),
        dtype=dtype,
        device=device,
        guidance=guidance,
        lora=lora,
    )

"""A teacher's VAE alone as a teacher, `--teacher vae:NAME`: what its latents tell without a diffusion transformer.

A control: where a student gains as much from them, the transformer had no share in it. One pass per image and view,
without noise, text or context; the only tap is `latents`, packed, shifted and scaled as the transformer is given them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pipeline.presets import VAE_PREFIX
from pipeline.teachers.architecture import Architecture
from pipeline.teachers.base import ContextMode, EncoderInput, ObjectCrop, Quantization, TapShape, Teacher, TeacherError
from pipeline.teachers.passes import memory_errors
from pipeline.teachers.timm_encoder import EncoderArchitecture

TAP = "latents"
_NO_ROOM = "the VAE does not fit: use --dtype bfloat16 or a larger device (it does not offload)"


class LatentEncoder:
    """The frozen VAE of a diffusion transformer. Fulfils `base.ImageEncoder`; the transformer is not loaded."""

    family = "vae"
    guidance: float | None = None
    lora: Path | None = None
    context: ContextMode = "joint"
    quantization: Quantization | None = None

    def __init__(self, teacher: Teacher, shapes: Architecture, *, input: EncoderInput = "object") -> None:
        """teacher: whose VAE it is, of which no part was loaded yet. Raises TeacherError where the VAE does not fit."""
        self._teacher, self.input = teacher, input
        self.source = VAE_PREFIX + teacher.source
        self.revision, self.pipeline_class = teacher.revision, teacher.pipeline_class
        self.resolution, self.dtype, self.device = teacher.resolution, teacher.dtype, teacher.device
        self.crop: ObjectCrop = "box"
        self._shape = latent_shape(shapes, self.resolution, self.source)
        with memory_errors(f"while loading teacher {self.source}", _NO_ROOM):
            teacher.load("vae")

    def digests(self) -> dict[str, str]:
        """SHA-256 of the VAE's weights and configuration."""
        return {"vae": self._teacher.encoder_identity("vae")["digests"]["vae"]}

    def taps(self, modulated: bool = False) -> list[str]:
        """The only one there is."""
        return [TAP]

    def tap_shape(self, tap: str) -> TapShape:
        """Shape of the latents; raises TeacherError for any other tap."""
        return _shape_of(tap, self._shape, self.source)

    def sigmas(self, num_steps: int) -> list[float]:
        """One noise level, 0; raises TeacherError for a schedule of more steps than that."""
        if num_steps != 1:
            raise TeacherError(
                f"the teacher {self.source} encodes images without noise: it has one timestep, --num-steps 1 "
                "--timesteps 1"
            )
        return [0.0]

    def encode(self, pixels: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """uint8 pixels (B, 3, R, R) → {"latents": (B, L, C)}, the mode of the VAE's distribution."""
        for tap in taps:
            self.tap_shape(tap)
        return dict.fromkeys(taps, self._teacher.encode_images(pixels)) if taps else {}


def latent_shape(shapes: Architecture, resolution: int, source: str) -> TapShape:
    """Tokens and channels of packed latents; raises TeacherError for a resolution that does not fit the VAE."""
    rows, columns = shapes.grid(resolution, source)
    return TapShape(TAP, rows * columns, shapes.latent_channels, (rows, columns))


def latent_architecture(shapes: Architecture, resolution: int, source: str) -> EncoderArchitecture:
    """What is known before anything is loaded, of the transformer's own architecture."""
    shape = latent_shape(shapes, resolution, source)
    return EncoderArchitecture(LatentEncoder.family, 0, shape.channels, (), shapes=(shape,))


def _shape_of(tap: str, shape: TapShape, source: str) -> TapShape:
    if tap != shape.name:
        raise TeacherError(f"the teacher {source} has no tap {tap!r}; it has {shape.name}")
    return shape

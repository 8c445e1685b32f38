"""A teacher's VAE alone as a teacher, `--teacher vae:NAME`: what its latents tell without a diffusion transformer.

A control: where a student gains as much from them, the transformer had no share in it. One pass per image and view,
without noise, text or context; the only tap is `latents`, packed, shifted and scaled as the transformer is given them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pipeline.presets import VAE_PREFIX
from pipeline.teachers.architecture import Architecture
from pipeline.teachers.base import EncoderInput, TapShape
from pipeline.teachers.diffusers_teacher import DiffusersTeacher
from pipeline.teachers.encoder import Encoder, EncoderArchitecture, encoder_architecture
from pipeline.teachers.passes import memory_errors

_NO_ROOM = "the VAE does not fit: use --dtype bfloat16 or a larger device (it does not offload)"


class LatentEncoder(Encoder):
    """The frozen VAE of a diffusion transformer. Fulfils `base.ImageEncoder`; the transformer is not loaded."""

    family = "vae"

    def __init__(self, teacher: DiffusersTeacher, *, input: EncoderInput = "object") -> None:
        """teacher: whose VAE it is, of which no part was loaded yet. Raises TeacherError where the VAE does not fit."""
        self._teacher, self.input = teacher, input
        self.source = VAE_PREFIX + teacher.source
        self.revision, self.pipeline_class = teacher.revision, teacher.pipeline_class
        self.resolution, self.dtype, self.device = teacher.resolution, teacher.dtype, teacher.device
        self.architecture = latent_architecture(teacher.architecture, self.resolution, self.source)
        with memory_errors(f"while loading teacher {self.source}", _NO_ROOM):
            teacher.load("vae")

    def digests(self) -> dict[str, str]:
        """SHA-256 of the VAE's weights and configuration."""
        return {"vae": self._teacher.encoder_identity("vae")["digests"]["vae"]}

    def encode(self, pixels: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """uint8 pixels (B, 3, R, R) → {"latents": (B, L, C)}, the mode of the VAE's distribution."""
        for tap in taps:
            self.tap_shape(tap)
        return dict.fromkeys(taps, self._teacher.encode_images(pixels)) if taps else {}


def latent_architecture(shapes: Architecture, resolution: int, source: str) -> EncoderArchitecture:
    """Packed latents as the only tap; raises TeacherError for a resolution that does not fit the VAE."""
    rows, columns = shapes.grid(resolution, source)
    shape = TapShape("latents", rows * columns, shapes.latent_channels, (rows, columns))
    return encoder_architecture(LatentEncoder.family, [shape])

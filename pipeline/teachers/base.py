"""What a teacher is to the pipeline. A new family of diffusion transformers is one file that fulfils `Teacher`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor

from cache_schema.errors import DitDistillError
from cache_schema.format.vocabulary import ContextMode, EncoderInput, ObjectCrop, Quantization

__all__ = [
    "AnyTeacher",
    "ContextMode",
    "EncoderInput",
    "ImageEncoder",
    "ObjectCrop",
    "Part",
    "Quantization",
    "TapShape",
    "Teacher",
    "TeacherError",
    "TextEmbedding",
    "input_of",
    "is_image_encoder",
]


class TeacherError(DitDistillError):
    """The teacher cannot be loaded or asked for what it has not; the message says what is missing."""


# What of a teacher is loaded and released as one.
Part = Literal["text", "vae", "transformer"]


@dataclass(frozen=True)
class TextEmbedding:
    """Text as the DiT takes it. tokens: (B, S, D); pooled: (B, D_pooled), D_pooled = 0 where the DiT takes none."""

    tokens: Tensor
    pooled: Tensor

    def repeat(self, times: int) -> "TextEmbedding":
        """Each row `times` times in a run: (B·times, …)."""
        return TextEmbedding(self.tokens.repeat_interleave(times, 0), self.pooled.repeat_interleave(times, 0))

    def rows(self, chosen: slice) -> "TextEmbedding":
        """The text of some images of the batch."""
        return TextEmbedding(self.tokens[chosen], self.pooled[chosen])


@dataclass(frozen=True)
class TapShape:
    """tokens: L object tokens, laid out as grid (rows, columns); channels: C."""

    name: str
    tokens: int
    channels: int
    grid: tuple[int, int]


class AnyTeacher(Protocol):
    """What the build and the manifest ask of every teacher, whatever it computes.

    A teacher without noise has one noise level, 0, and neither guidance, LoRA nor quantization. crop: what it is shown
    of an object: the box or the square around it.
    """

    family: str
    source: str
    revision: str | None
    pipeline_class: str
    resolution: int
    guidance: float | None
    lora: Path | None
    context: ContextMode
    crop: ObjectCrop
    quantization: Quantization | None
    device: torch.device
    dtype: torch.dtype

    @property
    def step_distilled(self) -> bool:
        """Whether it was distilled to a few steps."""
        ...

    def digests(self) -> dict[str, str]:
        """Component name → SHA-256 of its weights and configuration."""
        ...

    def taps(self, modulated: bool = False) -> list[str]:
        """Every tap there is, from the input to the output, each place once; of a DiT also the modulated if wanted."""
        ...

    def tap_shape(self, tap: str) -> TapShape:
        """Shape of a tap; raises TeacherError, listing the known taps, for an unknown one."""
        ...

    def sigmas(self, num_steps: int) -> list[float]:
        """The noise levels of a schedule of so many steps, noisiest first, as the family's own sampler visits them."""
        ...


class ImageEncoder(AnyTeacher, Protocol):
    """A frozen network that reads an image in one pass: no noise, no text, no context."""

    input: EncoderInput

    def encode(self, pixels: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """uint8 pixels (B, 3, R, R) → {tap: (B, L, C_tap)}, without gradients; nothing behind the last tap runs."""
        ...


def is_image_encoder(teacher: "AnyTeacher") -> TypeGuard[ImageEncoder]:
    """Whether a teacher reads images in one pass rather than noisy latents."""
    return hasattr(teacher, "encode")


def input_of(teacher: "AnyTeacher") -> EncoderInput:
    """What a teacher is shown of a photograph: always the object, but for image encoders that were asked for more."""
    return teacher.input if is_image_encoder(teacher) else "object"


class Teacher(AnyTeacher, Protocol):
    """A frozen diffusion transformer with its VAE, text encoders and scheduler.

    Each of the three is loaded when it is first used, and stays in memory until it is released.
    transformer: the trainable module, for Stage I. lora: the LoRA attached at load time, if any. context: how the clean
    context enters; features and predict compute the same function of it. quantization: of the transformer's weights.
    Latents are packed tokens (B, L, C_latent), already shifted and scaled as the DiT expects them.
    """

    @property
    def transformer(self) -> Any: ...

    def load(self, part: Part) -> None:
        """Have the text encoders, the VAE or the transformer in memory, as their first use would."""
        ...

    def release(self, part: Part) -> None:
        """Take the text encoders, the VAE or the transformer out of memory; what was trained in it is lost."""
        ...

    def encoder_identity(self, part: Part) -> dict[str, Any]:
        """All that decides which numbers `encode_text` or `encode_images` gives for an input, as JSON values."""
        ...

    def encode_text(self, captions: Sequence[str]) -> TextEmbedding: ...

    def encode_images(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, R, R) → packed clean latents (B, L, C_latent); the posterior's mode, so nothing is random."""
        ...

    def decode_images(self, latents: Tensor) -> Tensor:
        """Packed clean latents (B, L, C_latent) → uint8 (B, 3, R, R), to look at."""
        ...

    def save_lora(self, folder: Path) -> Path:
        """Write the LoRA attached for training in diffusers' own layout; returns the file."""
        ...

    def predict(self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding) -> Tensor:
        """E_{O,t} at the output: the estimate of z_O − ε, object tokens only. Gradients flow.

        noisy, context: (B, L, C_latent); sigma: (B,). Returns (B, L, C_latent).
        """
        ...

    def features(
        self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding, taps: Sequence[str]
    ) -> dict[str, Tensor]:
        """E_{O,t} at the named taps, without gradients: {tap: (B·T, L, C_tap)}. Blocks after the last tap do not run.

        noisy: (B·T, L, C_latent) and sigma: (B·T,), the T timesteps of an image in a run; context: (B, L, C_latent) and
        text, B rows: once per image. All of it goes through the DiT in one pass.
        """
        ...

"""From samples to what the DiT is conditioned on: object latents, context latents and text."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.datasets.base import Dataset, Sample
from pipeline.teachers.base import Teacher, TextEmbedding
from pipeline.views import apply_view, object_view, resize_square

# What PIL raises for bytes that are no image, or an image cut short or too large to be one.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Conditions:
    """z_O and z_I: (B, L, C_latent) packed clean latents; text: the captions' embedding."""

    object: Tensor
    context: Tensor
    text: TextEmbedding


def decode_image(data: bytes) -> Image.Image:
    """Decode a whole image to RGB, upright. Raises one of `UNREADABLE` if the bytes are not a complete image."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return ImageOps.exif_transpose(image).convert("RGB")


def caption_of(sample: Sample, superclass: str) -> str:
    """The sample's caption, or a neutral one that names only the super-class."""
    return sample.caption or f"a photo of a {superclass}"


def teacher_pixels(dataset: Dataset, sample: Sample, resolution: int, view: str) -> tuple[np.ndarray, np.ndarray]:
    """(I_O, I) of one sample under a view, each (3, R, R) uint8."""
    image = decode_image(dataset.read(sample))
    box = sample.box or (0.0, 0.0, float(image.width), float(image.height))
    pair = (object_view(image, box, resolution), resize_square(image, resolution))
    crop, whole = (np.asarray(apply_view(p, view)).transpose(2, 0, 1) for p in pair)
    return crop, whole


def encode_conditions(
    teacher: Teacher, dataset: Dataset, samples: Sequence[Sample], view: str, use_captions: bool = True
) -> Conditions:
    """Read, crop and encode a batch of samples as the teacher will see them.

    Without captions the text is empty, as an unconditional prompt is.
    """
    pairs = [teacher_pixels(dataset, s, teacher.resolution, view) for s in samples]
    objects, contexts = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
    return Conditions(
        object=teacher.encode_images(objects),
        context=teacher.encode_images(contexts),
        text=teacher.encode_text([caption_of(s, dataset.superclass) if use_captions else "" for s in samples]),
    )

"""From samples to what the DiT is conditioned on: object latents, context latents and text."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.datasets.base import DataError, Dataset, Sample
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


def read_image(dataset: Dataset, sample: Sample) -> Image.Image:
    """The image of a sample that the scan has found intact, RGB; raises DataError if it no longer is."""
    try:
        return decode_image(dataset.read(sample))
    except UNREADABLE as error:
        raise DataError(
            f"{sample.source} was intact a while ago and cannot be read now: {error}; put it back and run the same "
            "command again: it resumes"
        ) from error


def caption_of(sample: Sample, superclass: str) -> str:
    """The sample's caption, or a neutral one that names only the super-class."""
    return sample.caption if sample.caption.strip() else f"a photo of a {superclass}"


@dataclass(frozen=True)
class Pixels:
    """I_O and I of a batch under one view: uint8 (B, 3, R, R) each."""

    object: Tensor
    context: Tensor


def read_pixels(
    dataset: Dataset, samples: Sequence[Sample], resolution: int, views: Sequence[str]
) -> dict[str, Pixels]:
    """Read and crop a batch of samples under each of some views; an image is decoded once for all of them.

    Raises DataError for an image that cannot be read.
    """
    batch = [_sample_pixels(dataset, sample, resolution, views) for sample in samples]
    pixels = {}
    for v, view in enumerate(views):
        objects, contexts = (torch.from_numpy(np.stack([pairs[v][side] for pairs in batch])) for side in (0, 1))
        pixels[view] = Pixels(objects, contexts)
    return pixels


def _sample_pixels(
    dataset: Dataset, sample: Sample, resolution: int, views: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(I_O, I) of one sample under each view, each (3, R, R) uint8."""
    image = read_image(dataset, sample)
    box = sample.box or (0.0, 0.0, float(image.width), float(image.height))
    crop, whole = object_view(image, box, resolution), resize_square(image, resolution)
    return [(_channels_first(apply_view(crop, view)), _channels_first(apply_view(whole, view))) for view in views]


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def encode_pixels(teacher: Teacher, pixels: Pixels, captions: Sequence[str]) -> Conditions:
    """Encode a batch of views and their captions as the teacher will see them."""
    return Conditions(
        object=teacher.encode_images(pixels.object),
        context=teacher.encode_images(pixels.context),
        text=teacher.encode_text(captions),
    )


def encode_conditions(
    teacher: Teacher, dataset: Dataset, samples: Sequence[Sample], view: str, use_captions: bool = True
) -> Conditions:
    """Read, crop and encode a batch of samples.

    Without captions the text is empty, as an unconditional prompt is.
    """
    pixels = read_pixels(dataset, samples, teacher.resolution, [view])[view]
    return encode_pixels(teacher, pixels, captions_of(dataset, samples, use_captions))


def captions_of(dataset: Dataset, samples: Sequence[Sample], use_captions: bool = True) -> list[str]:
    """The text a batch of samples is conditioned on."""
    return [caption_of(sample, dataset.superclass) if use_captions else "" for sample in samples]

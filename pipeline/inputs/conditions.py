"""What the DiT is conditioned on, and from samples to the pixels and captions that it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.datasets.base import Dataset, Sample
from pipeline.inputs.decoding import read_image
from pipeline.inputs.views import apply_view, object_view, resize_square
from pipeline.teachers.base import TextEmbedding


@dataclass(frozen=True)
class Conditions:
    """z_O and z_I: (B, L, C_latent) packed clean latents; text: the captions' embedding."""

    object: Tensor
    context: Tensor
    text: TextEmbedding

    def rows(self, chosen: slice) -> "Conditions":
        """Those of some images of the batch."""
        return Conditions(self.object[chosen], self.context[chosen], self.text.rows(chosen))

    def to(self, device: torch.device) -> "Conditions":
        """The same on a device."""
        text = TextEmbedding(self.text.tokens.to(device), self.text.pooled.to(device))
        return Conditions(self.object.to(device), self.context.to(device), text)


def caption_of(sample: Sample, superclass: str) -> str:
    """The sample's caption, or a neutral one that names only the super-class."""
    article = "an" if superclass[:1].lower() in "aeiou" else "a"
    return sample.caption if sample.caption.strip() else f"a photo of {article} {superclass}"


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
    image, box = read_image(dataset, sample)
    crop, whole = object_view(image, box, resolution), resize_square(image, resolution)
    return [(_channels_first(apply_view(crop, view)), _channels_first(apply_view(whole, view))) for view in views]


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def captions_of(dataset: Dataset, samples: Sequence[Sample], use_captions: bool = True) -> list[str]:
    """The text a batch of samples is conditioned on; without captions it is empty, as an unconditional prompt is."""
    return [caption_of(sample, dataset.superclass) if use_captions else "" for sample in samples]

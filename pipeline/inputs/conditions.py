"""What the DiT is conditioned on, and from samples to the pixels and captions that it is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.datasets.base import Dataset, Sample
from pipeline.inputs.decoding import read_image
from pipeline.inputs.framing import Framing
from pipeline.inputs.views import apply_view, cut, is_crop, object_view, resize_square, square_view
from pipeline.teachers.base import TextEmbedding

WHOLE = Framing()


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
    dataset: Dataset, samples: Sequence[Sample], resolution: int, views: Sequence[str], framing: Framing = WHOLE
) -> dict[str, Pixels]:
    """Read and crop a batch of samples under each of some views; an image is decoded once for all of them.

    A random crop takes the place of the object, or of the whole image where that is what the teacher is shown. Raises
    DataError for an image that cannot be read.
    """
    batch = [_sample_pixels(dataset, sample, resolution, views, framing) for sample in samples]
    pixels = {}
    for v, view in enumerate(views):
        objects, contexts = (torch.from_numpy(np.stack([pairs[v][side] for pairs in batch])) for side in (0, 1))
        pixels[view] = Pixels(objects, contexts)
    return pixels


def _sample_pixels(
    dataset: Dataset, sample: Sample, resolution: int, views: Sequence[str], framing: Framing
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(I_O, I) of one sample under each view, each (3, R, R) uint8."""
    image, box = read_image(dataset, sample)
    cut_out = square_view if framing.object_crop == "square" else object_view
    crop, whole = cut_out(image, box, resolution), resize_square(image, resolution)

    def shown(view: str) -> tuple[Image.Image, Image.Image]:
        if not is_crop(view):
            return apply_view(crop, view), apply_view(whole, view)
        x0, y0, x1, y1 = framing.crop(sample.id, view, image.size, box)
        width, height = image.size
        part = cut(image, (x0 * width, y0 * height, x1 * width, y1 * height), resolution)
        return (part, part) if framing.input == "image" else (part, whole)

    pairs = [shown(view) for view in views]
    return [(_channels_first(objects), _channels_first(contexts)) for objects, contexts in pairs]


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def captions_of(dataset: Dataset, samples: Sequence[Sample], use_captions: bool = True) -> list[str]:
    """The text a batch of samples is conditioned on; without captions it is empty, as an unconditional prompt is."""
    return [caption_of(sample, dataset.superclass) if use_captions else "" for sample in samples]

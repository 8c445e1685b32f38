"""What the DiT is conditioned on, and from samples to the pixels and captions that it is made of."""

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from pipeline.datasets.base import DataError, Dataset, Sample
from pipeline.inputs.views import Box, apply_view, object_view, resize_square
from pipeline.teachers.base import TextEmbedding

# What PIL raises for bytes that are no image, or an image cut short or too large to be one.
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, NotImplementedError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


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


def decode_image(data: bytes) -> Image.Image:
    """Decode a whole image to RGB, upright. Raises one of `UNREADABLE` if the bytes are not a complete image."""
    return decode_with_box(data, None)[0]


def decode_with_box(data: bytes, box: Box | None) -> tuple[Image.Image, Box]:
    """Decode a whole image to RGB, upright, and turn its box with it; without a box, the whole image is the box.

    Boxes are drawn on the stored pixels (`Sample.box`): the tools that the data sets were annotated with did not look
    at EXIF. The returned box is in pixels of the returned image. Sixteen bits per channel are scaled to eight,
    transparency is put on white. Raises one of `UNREADABLE` if the bytes are not a complete image.
    """
    image = Image.open(io.BytesIO(data))
    # PIL turns TIFF files while it loads them, others not; only before loading can both be seen.
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    image.load()
    rgb = _to_rgb(image)
    if orientation not in _UPRIGHT:
        return rgb, box or (0.0, 0.0, float(rgb.width), float(rgb.height))
    turn = _UPRIGHT[orientation]
    if image.getexif().get(ExifTags.Base.Orientation) == orientation:
        rgb = rgb.transpose(turn)
    upright = (0.0, 0.0, float(rgb.width), float(rgb.height))
    return rgb, _turn_box(box, rgb.size, turn) if box else upright


def box_on_stored_pixels(data: bytes, image: Image.Image, box: Box) -> Box:
    """Where a box of the upright image that `decode_image` made of `data` lies on the stored pixels (`Sample.box`)."""
    with Image.open(io.BytesIO(data)) as stored:
        turn = _UPRIGHT.get(stored.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is None:
        return box
    size = image.size if turn in _KEEPS_SIDES else image.size[::-1]
    back = {
        Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
        Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    }
    return _turn_box(box, size, back.get(turn, turn))


# What must be done to the stored pixels for each value of EXIF's Orientation (EXIF 2.32, 4.6.4 A).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_KEEPS_SIDES = {_UPRIGHT[2], _UPRIGHT[3], _UPRIGHT[4]}


def _turn_box(box: Box, upright: tuple[int, int], turn: Image.Transpose) -> Box:
    """Where a box lies after the stored image is turned; upright: the width and height it has then."""
    x0, y0, x1, y1 = box
    width, height = upright if turn in _KEEPS_SIDES else upright[::-1]
    left, up = (width - x1, width - x0), (height - y1, height - y0)  # the ranges seen from the other side
    xs, ys = {
        Image.Transpose.FLIP_LEFT_RIGHT: (left, (y0, y1)),
        Image.Transpose.ROTATE_180: (left, up),
        Image.Transpose.FLIP_TOP_BOTTOM: ((x0, x1), up),
        Image.Transpose.TRANSPOSE: ((y0, y1), (x0, x1)),
        Image.Transpose.ROTATE_270: (up, (x0, x1)),
        Image.Transpose.TRANSVERSE: (up, left),
        Image.Transpose.ROTATE_90: ((y0, y1), left),
    }[turn]
    return xs[0], ys[0], xs[1], ys[1]


def _to_rgb(image: Image.Image) -> Image.Image:
    # PIL clips deep greys at 255, which turns a 16-bit photograph white.
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # The colour of a transparent pixel is whatever the encoder left there; no viewer shows it.
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def read_image(dataset: Dataset, sample: Sample) -> tuple[Image.Image, Box]:
    """A sample that the scan has found intact, as from `decode_with_box`; raises DataError if it no longer is."""
    try:
        return decode_with_box(dataset.read(sample), sample.box)
    except UNREADABLE as error:
        raise DataError(
            f"{sample.source} was intact a while ago and cannot be read now: {error}; put it back and run the same "
            "command again: it resumes"
        ) from error


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

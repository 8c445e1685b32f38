"""From the bytes of an image file to upright RGB pixels, and the box turned with them."""

import io
import re
import struct

from PIL import ExifTags, Image, UnidentifiedImageError

from pipeline.datasets.base import DataError, Dataset, Sample
from pipeline.inputs.decoded import DecodedImages
from pipeline.inputs.pixel_range import PixelRangeError, is_sixteen_bits, to_rgb
from pipeline.inputs.views import Box
from pipeline.watchdog import watched

# What PIL raises for bytes that are no image, or an image cut short or too large to be one.
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, NotImplementedError, struct.error, Image.DecompressionBombError,
)  # fmt: skip


def reason_of(error: Exception) -> str:
    """Why an image could not be read, in one line that is the same in every run."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"  # Pillow's message is the address of a buffer
    if isinstance(error, PixelRangeError):
        return str(error)
    if isinstance(error, DataError):
        return f"cannot be read: {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "not a complete image: " + re.sub(r" at 0x[0-9a-fA-F]+", "", first)


def decode_image(data: bytes) -> Image.Image:
    """Decode a whole image to RGB, upright. Raises one of `UNREADABLE` if the bytes are not a complete image."""
    return decode_with_box(data, None)[0]


def decode_with_box(data: bytes, box: Box | None) -> tuple[Image.Image, Box]:
    """Decode a whole image to RGB, upright, and turn its box with it; without a box, the whole image is the box.

    Boxes are drawn on the stored pixels (`Sample.box`): the tools that the data sets were annotated with did not look
    at EXIF. The returned box is in pixels of the returned image. How deeper values become 8 bits is in
    `pixel_range`. Raises one of `UNREADABLE` if the bytes are not a complete image whose values can be understood.
    """
    image, sixteen_bits, orientation = _load(data)
    rgb = to_rgb(image, sixteen_bits)
    if orientation not in _UPRIGHT:
        return rgb, box or (0.0, 0.0, float(rgb.width), float(rgb.height))
    turn = _UPRIGHT[orientation]
    if image.getexif().get(ExifTags.Base.Orientation) == orientation:
        rgb = rgb.transpose(turn)
    upright = (0.0, 0.0, float(rgb.width), float(rgb.height))
    return rgb, _turn_box(box, rgb.size, turn) if box else upright


def _load(data: bytes) -> tuple[Image.Image, bool, int | None]:
    """An image with its pixels decoded; whether they are stored in 16 bits; EXIF's Orientation before loading.

    Raises one of `UNREADABLE`.
    """
    try:
        image = Image.open(io.BytesIO(data))
        sixteen_bits = is_sixteen_bits(image)
        # PIL turns TIFF files while it loads them, others not; only before loading can both be seen.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        image.load()
    # So says PIL of a damaged AVIF, and of metadata of another type; of our own code they would be bugs.
    except (RuntimeError, TypeError) as error:
        raise SyntaxError(str(error)) from error
    return image, sixteen_bits, orientation


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


def read_image(dataset: Dataset, sample: Sample) -> tuple[Image.Image, Box]:
    """A sample that the scan has found intact, as from `decode_with_box`; raises DataError if it no longer is.

    What the scan kept of it is not read again.
    """
    kept = dataset.kept(sample) if isinstance(dataset, DecodedImages) else None
    if kept is not None:
        return kept
    try:
        with watched("needed", "reading and decoding what was read well before", [sample.id], [sample.source]):
            return decode_with_box(dataset.read(sample), sample.box)
    except UNREADABLE as error:
        raise DataError(
            f"{sample.source} was intact a while ago and cannot be read now: {error}; put it back and run the same "
            "command again: it resumes"
        ) from error

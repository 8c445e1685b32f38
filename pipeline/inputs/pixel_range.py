"""What the numbers of an image file mean: more than eight bits, floating point and their ranges, turned into 8-bit RGB.

A file whose range is not known is refused: guessed, it would be black, white or grey without a word.
"""

import io

import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.TiffTags import TAGS_V2

_TAGS = {tag.name: number for number, tag in TAGS_V2.items()}
_BITS, _PHOTOMETRIC, _FORMAT = (_TAGS[name] for name in ("BitsPerSample", "PhotometricInterpretation", "SampleFormat"))
_WHITE_IS_ZERO = 0
_UNSIGNED, _SIGNED = 1, 2
_COLOURS = ("RGB", "RGBA", "RGBX", "LA")
# Of 16 bits: a photograph may be dark, but its brightest pixel is rarely below a quarter of the range.
_MOST_BITS_OF_LESS = 14
_MOST_OF_SIXTEEN = (1 << 16) - 1
_FULL_RANGES = frozenset((1 << bits) - 1 for bits in range(8, 33))
# What rounds to 0 and to 255 still counts as 0 and 1.
_ROUNDING = 0.5 / 255


class PixelRangeError(ValueError):
    """The values of an image could mean several things, or would all be one shade; the message says which values."""


def to_rgb(image: Image.Image, sixteen_bits: bool = False) -> Image.Image:
    """A loaded image as 8-bit RGB: deep and floating-point values scaled by their range, transparency put on white.

    sixteen_bits: what `is_sixteen_bits` said before it was loaded. Raises PixelRangeError where the range of the values
    is not known, or eight bits would show nothing of them.
    """
    if _number(image, _FORMAT) == _SIGNED and image.mode == "L":
        raise PixelRangeError("whole numbers of 8 bits with a sign, whose range is not known; save it without a sign")
    # Pillow keeps the high byte of deep colours, whose low one may be all that there is.
    if sixteen_bits and image.mode in _COLOURS and not any(band.getbbox() for band in image.split()[:3]):
        raise PixelRangeError(_one_shade(255, _MOST_OF_SIXTEEN))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        # The colour of a transparent pixel is whatever the encoder left there; no viewer shows it.
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def bits_used(data: bytes) -> int | None:
    """How many of 16 bits the values of a deeper image file use, where so few that they may be of another range.

    None for other files, and for those that declare their range. The file must be one that decodes.
    """
    with Image.open(io.BytesIO(data)) as image:
        grey = image.mode.startswith("I")
        if not (image.mode == "F" or is_sixteen_bits(image)) or _declared_most(image) is not None:
            return None
        image.load()
        if image.mode == "F":
            bits = round(float(np.asarray(image).max()) * _MOST_OF_SIXTEEN).bit_length()
            return bits if bits <= _MOST_BITS_OF_LESS else None
        # Pillow keeps the high byte of colours; the low one is then taken to be full.
        peaks = [int(np.asarray(band).max()) for band in image.split()[: 3 if image.mode.startswith("RGB") else 1]]
    bits = max((peak if grey else peak * 256 + 255).bit_length() for peak in peaks)
    return bits if bits <= _MOST_BITS_OF_LESS else None


def is_sixteen_bits(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet is stored in 16 bits per channel, whatever Pillow makes of them."""
    if (image.format == "PPM" and image.mode == "I") or (image.format == "JPEG2000" and image.mode == "I;16"):
        return True
    arguments = [tile[3] for tile in getattr(image, "tile", ())]
    raw = [args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else "" for args in arguments]
    # More ink is darker, so that small values of CMYK are no sign of a smaller range.
    return any(isinstance(mode, str) and ";16" in mode and not mode.startswith(("I;16S", "CMYK")) for mode in raw)


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Values of one channel as uint8 (height, width)."""
    values = np.asarray(image)
    eight = _from_floats(values, _declared_most(image)) if image.mode == "F" else _from_whole_numbers(values, image)
    return 255 - eight if _number(image, _PHOTOMETRIC) == _WHITE_IS_ZERO else eight


def _from_floats(values: np.ndarray, declared: int | None) -> np.ndarray:
    low, high, most = float(values.min()), float(values.max()), declared or 1
    if not (np.isfinite(low) and np.isfinite(high)):
        raise PixelRangeError("its floating-point values are not all finite")
    if low < -_ROUNDING * most or high > (1 + _ROUNDING) * most:
        raise PixelRangeError(
            f"floating-point values from {low:.4g} to {high:.4g}, whose range is not known (0 to 1 would be); save it "
            "in 8 bits"
        )
    eight = ((values / most).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    if high > low and not eight.any():
        raise PixelRangeError(_one_shade(high, most))
    return eight


def _from_whole_numbers(values: np.ndarray, image: Image.Image) -> np.ndarray:
    most = _declared_most(image)
    if values.dtype == np.int32 and _number(image, _FORMAT) == _UNSIGNED:
        values = values.view(np.uint32)  # Pillow has no such type
    # Pillow brings deep PGM files to 16 bits by the largest value that they declare.
    if most is None and (image.mode.startswith("I;16") or image.format == "PPM"):
        most = _MOST_OF_SIXTEEN
    low, high = int(values.min()), int(values.max())
    if most is None:
        raise PixelRangeError(
            f"whole numbers from {low} to {high} with a sign or 32 bits, whose range is not known; save it in 8 bits"
        )
    if low < 0 or high > most:
        raise PixelRangeError(f"values from {low} to {high} outside the range that it declares, 0 to {most}")
    eight = (values.astype(np.int64) * 256 // (most + 1)).astype(np.uint8)
    if high and not eight.any():
        raise PixelRangeError(_one_shade(high, most))
    return eight


def _one_shade(high: float, most: int) -> str:
    return f"values up to {high:.4g} of a range to {most}, which would all be one shade; save it in 8 bits"


def _declared_most(image: Image.Image) -> int | None:
    """The largest value that a TIFF file says its values can have, where that is a number of bits and not its type's.

    Some programs write the largest value that is there; that says nothing of what the others mean.
    """
    for least, greatest in (("SMinSampleValue", "SMaxSampleValue"), ("MinSampleValue", "MaxSampleValue")):
        low, high = _number(image, _TAGS[least]), _number(image, _TAGS[greatest])
        if low in (None, 0) and high is not None and high in _FULL_RANGES:
            return int(high)
    bits = _number(image, _BITS)
    return (1 << int(bits)) - 1 if bits is not None and 8 < bits < 16 else None


def _number(image: Image.Image, tag: int) -> float | None:
    """The (first) value of a TIFF tag; None without one, and for other files."""
    value = image.tag_v2.get(tag) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    while isinstance(value, tuple) and value:
        value = value[0]
    try:
        return None if value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError):
        return None

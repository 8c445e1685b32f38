"""Boxes as the data sets write them, turned into ours: (x0, y0, x1, y1), pixel edges, 0-based, x1 and y1 exclusive."""

import math
from typing import SupportsFloat, cast

Box = tuple[float, float, float, float]

LARGEST_COORDINATE = 1_000_000


def coordinate(value: object) -> float:
    """A number of pixels, from a number or its text. Raises ValueError unless it is finite and plausible."""
    try:
        # Python also reads 1_000, other scripts' digits and True as numbers; no data set means them.
        if isinstance(value, bool) or (isinstance(value, str) and ("_" in value or not value.isascii())):
            raise ValueError
        number = float(cast(SupportsFloat, value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{str(value)[:40]!r} is not a number of pixels") from None
    if not math.isfinite(number) or abs(number) > LARGEST_COORDINATE:
        raise ValueError(f"{str(value)[:40]!r} is not a number of pixels")
    return number


def from_corner_and_size(x: float, y: float, width: float, height: float) -> Box:
    """A box given by its upper left corner, counted from 0, and its size."""
    return x, y, x + width, y + height


def from_inclusive(x0: float, y0: float, x1: float, y1: float) -> Box:
    """A box in MATLAB's way: pixels are counted from 1 and the last one belongs to the box."""
    return x0 - 1, y0 - 1, x1, y1


def area(box: Box) -> float:
    """Pixels in a box; a box turned inside out has none."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

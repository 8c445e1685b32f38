"""What the teacher looks at: the object-centric view I_O and the context view I, both square."""

import math

from PIL import Image, ImageOps

VIEWS = ("canonical", "hflip")

Box = tuple[float, float, float, float]


def resize_square(image: Image.Image, resolution: int) -> Image.Image:
    """The whole image as resolution × resolution RGB (aspect is not kept: every pixel of the photograph is seen)."""
    return resize(image, (resolution, resolution))


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole image as width × height RGB."""
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def object_view(image: Image.Image, box: Box, resolution: int) -> Image.Image:
    """The object-centric view I_O: the box (x0, y0, x1, y1 in pixels), cropped and resized to a square.

    Raises ValueError if the box has no pixel inside the image.
    """
    if not all(map(math.isfinite, box)):
        raise ValueError(f"box {tuple(box)} is not made of finite numbers")
    x0, y0 = max(0.0, box[0]), max(0.0, box[1])
    x1, y1 = min(float(image.width), box[2]), min(float(image.height), box[3])
    if x1 - x0 < 1 or y1 - y0 < 1:
        raise ValueError(f"box {tuple(box)} has no pixel inside the {image.width}×{image.height} image")
    return image.convert("RGB").resize((resolution, resolution), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))


def apply_view(image: Image.Image, view: str) -> Image.Image:
    """`canonical` leaves the image as it is, `hflip` mirrors it left to right."""
    if view == "hflip":
        return ImageOps.mirror(image)
    if view == "canonical":
        return image
    raise ValueError(f"unknown view {view!r}: known are {', '.join(VIEWS)}")

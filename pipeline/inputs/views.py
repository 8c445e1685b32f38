"""What the teacher looks at: the object-centric view I_O and the context view I, both square, and their names."""

import math
from collections.abc import Sequence

from PIL import Image, ImageOps

from cache_schema.errors import DitDistillError
from cache_schema.format.square import square_around
from cache_schema.format.vocabulary import CROP_VIEW

VIEWS = ("canonical", "hflip")
MOST_CROPS = 64
_CROPS = "crops:"

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
    return cut(image, inside(box, image.size), resolution)


def cut(image: Image.Image, box: Box, resolution: int) -> Image.Image:
    """A box that lies inside the image, in pixels, as resolution × resolution RGB."""
    return image.convert("RGB").resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def inside(box: Box, size: tuple[int, int]) -> Box:
    """The part of a box that lies inside an image of `size`; raises ValueError if that is no pixel."""
    if not all(map(math.isfinite, box)):
        raise ValueError(f"box {tuple(box)} is not made of finite numbers")
    width, height = size
    x0, y0 = max(0.0, box[0]), max(0.0, box[1])
    x1, y1 = min(float(width), box[2]), min(float(height), box[3])
    if x1 - x0 < 1 or y1 - y0 < 1:
        raise ValueError(f"box {tuple(box)} has no pixel inside the {width}×{height} image")
    return x0, y0, x1, y1


def square_view(image: Image.Image, box: Box, resolution: int) -> Image.Image:
    """The square around the box as resolution × resolution RGB, in the image's mean colour where it is beyond it.

    Raises ValueError if the box has no pixel inside the image.
    """
    x0, y0, x1, y1 = square_around(inside(box, image.size), image.size)
    rgb, side = image.convert("RGB"), x1 - x0
    seen = inside((x0, y0, x1, y1), image.size)
    left, top, right, bottom = (
        round((edge - corner) / side * resolution) for edge, corner in zip(seen, (x0, y0, x0, y0), strict=True)
    )
    size = max(1, right - left), max(1, bottom - top)
    part = rgb.resize(size, Image.Resampling.BICUBIC, box=seen)
    if size == (resolution, resolution):
        return part
    view = Image.new("RGB", (resolution, resolution), rgb.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
    view.paste(part, (min(left, resolution - size[0]), min(top, resolution - size[1])))
    return view


def expand_views(given: Sequence[str]) -> tuple[str, ...]:
    """The names of views, with crop.0, crop.1, … for `crops:K`.

    Raises DitDistillError for a view that there is not, for none at all, and for one that is named twice.
    """
    views: list[str] = []
    for name in given:
        number = name.removeprefix(_CROPS)
        if name.startswith(_CROPS) and number.isdecimal() and 1 <= int(number) <= MOST_CROPS:
            views += [f"{CROP_VIEW}{k}" for k in range(int(number))]
        else:
            views.append(name)
    crops = [view for view in views if is_crop(view)]
    known = {*VIEWS, *(f"{CROP_VIEW}{k}" for k in range(len(crops)))}
    if not views or len(set(views)) != len(views) or not known.issuperset(views) or len(crops) > MOST_CROPS:
        raise DitDistillError(
            f"--views {','.join(given)}: name one or more of {', '.join(VIEWS)} and crops:K (K from 1 to "
            f"{MOST_CROPS}), each once"
        )
    return tuple(views)


def is_crop(view: str) -> bool:
    """Whether a view is one of the random crops."""
    return view.startswith(CROP_VIEW)


def apply_view(image: Image.Image, view: str) -> Image.Image:
    """`canonical` leaves the image as it is, `hflip` mirrors it left to right."""
    if view == "hflip":
        return ImageOps.mirror(image)
    if view == "canonical":
        return image
    raise ValueError(f"unknown view {view!r}: known are {', '.join(VIEWS)}")

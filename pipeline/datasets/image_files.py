"""Image files of a data set: which paths are allowed, and reading one without leaving the data set's folder."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipeline.datasets.base import DataError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


class OutsideLinkError(DataError, OSError):
    """An image file is a link that leaves the data set's folder; to a scan, a file that cannot be read."""


def require_layout(name: str, root: Path, needed: Sequence[str], layout: str, published: str) -> None:
    """Raise DataError unless every path of `needed` is in `root`; the message gives the layout and its source."""
    for path in needed:
        if not (root / path).exists():
            raise DataError(
                f"data set {name}: looked in {root} and found no {path}; it must contain {layout}; "
                f"published as {published}"
            )


def relative_path(text: str) -> str:
    """An image's path as a list gives it, in its plainest form. Raises ValueError if it could leave the folder."""
    path = PurePosixPath(text)
    if not path.parts or "\0" in text:
        raise ValueError(f"{text!r} is not the path of an image")
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"image path {text!r} leads out of the data set's folder; expected one relative to it")
    return str(path)


def read_image_file(root: Path, source: str) -> bytes:
    """The bytes of `root/source`.

    The root, and a folder directly in it such as `images/`, may be links to another disk. Any other link must stay
    inside them: a data set that somebody else packed cannot pull other files of this machine into a cache. Raises
    OSError for a file that is missing, OutsideLinkError for one behind such a link.
    """
    parts = PurePosixPath(source).parts
    allowed = [root, root / parts[0]] if len(parts) > 1 else [root]
    file = (root / source).resolve()
    if not any(file.is_relative_to(folder.resolve()) for folder in allowed):
        raise OutsideLinkError(f"{root / source} is a link that leaves the data set's folder; put a copy there")
    return file.read_bytes()

"""Image files of a folder: which there are, what class their place says, and their pixels, upright and in RGB."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps, UnidentifiedImageError

from trainer.errors import TrainError

SUFFIXES = frozenset(
    {
        ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm",
        ".tga", ".tif", ".tiff", ".webp",
    }
)  # fmt: skip
MAX_MEGAPIXELS = 100.0
# Folders of a data set's parts, above those of its classes.
PARTS = frozenset({"train", "test", "val", "valid", "validation", "query", "gallery", "unlabeled"})
# What PIL raises for bytes that are no image; RuntimeError of a damaged AVIF, TypeError of metadata of another type.
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, RuntimeError, TypeError, struct.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip
_DEEP = ("I", "F")  # 16 bits and more, or floating point: eight bits of them would be a guess


class UnreadableImageError(TrainError):
    """A file is not a whole image, or one that can be shown; the message says why, and not which file."""


def find_images(root: Path) -> list[str]:
    """Paths of the images below a folder, relative to it, in order; hidden files and folders are left out.

    Raises TrainError where there is none, for a folder that cannot be read, and for a link to a folder.
    """
    if not root.is_dir():
        raise TrainError(f"{root} is not a folder of images" if root.exists() else f"there is no folder {root}")
    found, others = [], 0
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        linked = next((name for name in folders if (Path(folder) / name).is_symlink()), None)
        if linked is not None:
            raise TrainError(f"{Path(folder) / linked}: a link to a folder, which is not followed; put a copy there")
        for name in files:
            if Path(name).suffix.lower() in SUFFIXES and not _is_hidden(name):
                found.append((Path(folder) / name).relative_to(root).as_posix())
            else:
                others += 1
    if not found:
        seen = f"; other files in it: {others}" if others else ""
        raise TrainError(f"{root} holds no image ({', '.join(sorted(SUFFIXES))}){seen}")
    _check_utf8(root, found)
    return sorted(found)


def class_of(name: str) -> str:
    """The class that an image's place says: the folder below the root, or below train/, test/ and the like; or ""."""
    folders = PurePosixPath(name).parts[:-1]
    if folders and folders[0].casefold() in PARTS:
        folders = folders[1:]
    return folders[0] if folders else ""


def parts_in(names: Sequence[str]) -> list[str]:
    """The folders of parts that images lie in, such as train and test."""
    tops = {PurePosixPath(name).parts[0] for name in names if "/" in name}
    return sorted(top for top in tops if top.casefold() in PARTS)


def decode_image(data: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> Image.Image:
    """A whole image as upright RGB, transparency on white; raises UnreadableImageError.

    The number of pixels is looked at before any is decoded.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        megapixels = image.width * image.height / 1e6
        if megapixels > max_megapixels:
            raise UnreadableImageError(
                f"{image.width} × {image.height} pixels are more than {max_megapixels:g} megapixels"
            )
        image.load()
        if image.mode in _DEEP or image.mode.startswith("I;16"):
            raise UnreadableImageError("its values have more than 8 bits; save it with 8")
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            layers = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise UnreadableImageError("not an image of a known format") from None
    except _UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UnreadableImageError(f"not a whole image: {reason}") from None


def _is_hidden(name: str) -> bool:
    """Hidden files, and what file servers and archivers leave behind."""
    return name.startswith((".", "@", "#", "$")) or name == "__MACOSX"


def _refuse(error: OSError) -> None:
    raise TrainError(f"{error.filename} cannot be read: {error.strerror}")


def _check_utf8(root: Path, names: Sequence[str]) -> None:
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise TrainError(f"{root}: the file name {os.fsencode(name)!r} is not UTF-8; rename it") from None

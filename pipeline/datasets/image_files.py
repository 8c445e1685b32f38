"""Image files of a data set: which paths are allowed, and reading one without leaving the data set's folder."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipeline.datasets.base import DataError

# Of the formats that Pillow reads, those that pictures of things come in; not icons, fonts, films and data. A fixed
# set: what a data set holds must not depend on how Pillow was built. Files that this one cannot read are quarantined.
IMAGE_SUFFIXES = frozenset(
    {
        ".apng", ".avif", ".avifs", ".bmp", ".dds", ".dib", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe",
        ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".ras", ".sgi",
        ".tga", ".tif", ".tiff", ".webp",
    }
)  # fmt: skip
# Folders that file servers, systems and archivers make, with thumbnails and deleted files in them.
_HOUSEKEEPING = frozenset(
    {
        "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "@sharebin", "@tmp",
        "__macosx", "__pycache__", "_gsdata_", "lost+found", "network trash folder", "recycler",
        "system volume information", "temporary items", "~snapshot",
    }
)  # fmt: skip
_RESCUED = re.compile(r"found\.\d{3}")  # what a disk check of Windows leaves
_HOUSEKEEPING_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini"})


class OutsideLinkError(DataError, OSError):
    """An image file is a link that leaves the data set's folder; to a scan, a file that cannot be read."""


def is_housekeeping(name: str) -> bool:
    """Say whether a file or folder is hidden or made by a system or file server, so that it is no part of the data."""
    plain = name.casefold()
    return name.startswith(".") or plain in _HOUSEKEEPING | _HOUSEKEEPING_FILES or bool(_RESCUED.fullmatch(plain))


def require_layout(name: str, root: Path, needed: Sequence[str], layout: str, published: str) -> None:
    """Raise DataError unless every path of `needed` is in `root`; the message gives the layout and its source.

    It also says so where the archives seem to be unpacked one folder too deep, or a file to be renamed by a download.
    """
    for path in needed:
        if not (root / path).exists():
            instead = where_instead(root, path)
            raise DataError(
                f"data set {name}: looked in {root} and found no {path}{instead}; it must contain {layout}; "
                f"published as {published}"
            )
        inner = root / path / Path(path).name
        if inner.is_dir():
            raise DataError(
                f"data set {name}: {inner} lies one folder too deep; move what is in it up into {root / path}"
            )


def where_instead(root: Path, path: str) -> str:
    """Where `root/path`, which is missing, may be instead, to go on in a sentence; empty if nothing looks like it."""
    renamed = renamed_by_download(root, path)
    if renamed:
        return renamed
    if root.is_dir():
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and (folder / path).exists():
                return f", but {folder / path}: give --data {folder}"
    return ""


def renamed_by_download(root: Path, path: str) -> str:
    """What `where_instead` says of a part of `root/path` that is there under another name; empty if none is."""
    place = root
    for part in PurePosixPath(path).parts:
        for other in sorted(place.iterdir()) if place.is_dir() and not (place / part).exists() else ():
            if _as_downloaded(other.name).casefold() == part.casefold():
                return f", but {other.name!r} beside it: rename it to {part}"
        place /= part
    return ""


def _as_downloaded(name: str) -> str:
    """A file's name without what browsers and copies add to it.

    `annos (1).mat`, `annos-2.mat`, `annos - Copy.mat` and `annos.mat.download` are annos.mat.
    """
    plain = name.removesuffix(".download").removesuffix(".crdownload")
    return re.sub(r"( - Copy| copy)?( \d+| ?\(\d+\)|-\d+)?(?=(\.\w+)?$)", "", plain, count=1)


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

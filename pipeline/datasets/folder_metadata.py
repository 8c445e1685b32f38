"""`metadata.csv`, `.jsonl` or `.parquet` beside the images of a folder: boxes, captions, classes and splits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.datasets.base import SPLITS, DataError
from pipeline.datasets.boxes import Box
from pipeline.datasets.image_files import relative_path
from pipeline.datasets.image_rows import CORNERS, box_of, read_rows, text_of

_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
COLUMNS = ("file_name", "box", *CORNERS, "caption", "split", "label", "class_name")


@dataclass(frozen=True)
class ImageMetadata:
    """What one row says about an image; where: the file and line it stands on. None is for what it does not say."""

    where: str
    class_name: str | None = None
    split: str | None = None
    box: Box | None = None
    caption: str = ""


NOTHING = ImageMetadata("")


def find_metadata(folder: Path) -> Path | None:
    """The metadata file of a folder, if it has one. Raises DataError if it has several."""
    present = [folder / name for name in _FILES if (folder / name).exists()]
    if len(present) > 1:
        raise DataError(f"{folder}: has {present[0].name} and {present[1].name}; keep one of them")
    return present[0] if present else None


def read_metadata(folder: Path) -> dict[str, ImageMetadata]:
    """The rows of a folder's metadata by the image's path relative to the folder; empty without a metadata file.

    Columns: `file_name`, and any of `box` ([x0, y0, x1, y1]) or `xmin`, `ymin`, `xmax`, `ymax`, in pixels of the stored
    image; `caption`; `split` (train, test, unlabeled); `class_name` or `label`. Empty values say nothing; other columns
    are not read. Raises DataError naming file and line.
    """
    path = find_metadata(folder)
    if path is None:
        return {}
    images: dict[str, ImageMetadata] = {}
    for where, row in read_rows(path, (*COLUMNS, "bbox"), ("file_name",)):
        try:
            name, image = _image(where, row)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if name in images:
            raise DataError(f"{where}: {name} is described by {images[name].where} already; each image may stand once")
        images[name] = image
    return images


def _image(where: str, row: dict[str, Any]) -> tuple[str, ImageMetadata]:
    file_name = text_of(row, "file_name")
    if file_name is None:
        raise ValueError("has no file_name; expected the path of an image relative to this file")
    split = text_of(row, "split")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    class_name = text_of(row, "class_name") or text_of(row, "label")
    return relative_path(file_name), ImageMetadata(where, class_name, split, box_of(row), text_of(row, "caption") or "")

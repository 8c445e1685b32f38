"""`metadata.csv`, `.jsonl` or `.parquet` beside the images of a folder: boxes, captions, classes and splits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.datasets.base import SPLITS, DataError
from pipeline.datasets.boxes import Box
from pipeline.datasets.image_files import relative_path
from pipeline.datasets.image_rows import CAPTIONS, CORNERS, Row, box_of, caption_text, read_rows, say_unread, text_of
from pipeline.datasets.label_column import label_texts
from pipeline.datasets.split_words import split_of_word

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
COLUMNS = ("file_name", "box", *CORNERS, *CAPTIONS, "split", "label", "class_name")


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
    present = [folder / name for name in METADATA_FILES if (folder / name).exists()]
    if len(present) > 1:
        raise DataError(f"{folder}: has {present[0].name} and {present[1].name}; keep one of them")
    return present[0] if present else None


def read_metadata(folder: Path, note: Callable[[str], None] = lambda _: None) -> dict[str, ImageMetadata]:
    """The rows of a folder's metadata by the image's path relative to the folder; empty without a metadata file.

    Columns: `file_name`, and any of `box` ([x0, y0, x1, y1]) or `xmin`, `ymin`, `xmax`, `ymax`, in pixels of the stored
    image; `caption` or `text`; `split` (train, test, unlabeled); `class_name` or `label`, read as in `label_texts`.
    Empty values say nothing; other columns are not read, and named to `note`. Raises DataError naming file and line.
    """
    path = find_metadata(folder)
    if path is None:
        return {}
    table = read_rows(path, (*COLUMNS, "bbox"), ("file_name",))
    say_unread(path, table, COLUMNS, note)
    names, labels = label_texts(table.rows, "class_name"), label_texts(table.rows, "label")
    images: dict[str, ImageMetadata] = {}
    for (where, row), class_name, label in zip(table.rows, names, labels, strict=True):
        try:
            name, image = _image(where, row, class_name or label)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if name in images:
            raise DataError(f"{where}: {name} is described by {images[name].where} already; each image may stand once")
        images[name] = image
    return images


def _image(where: str, row: Row, class_name: str | None) -> tuple[str, ImageMetadata]:
    file_name = text_of(row, "file_name")
    if file_name is None:
        raise ValueError("has no file_name; expected the path of an image relative to this file")
    word = text_of(row, "split")
    split = None if word is None else split_of_word(word)
    if word is not None and split is None:
        raise ValueError(f"split {word!r} is none of {', '.join(SPLITS)}")
    return relative_path(file_name), ImageMetadata(where, class_name, split, box_of(row), caption_text(row) or "")

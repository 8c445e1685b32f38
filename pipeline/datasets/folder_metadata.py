"""`metadata.csv`, `.jsonl` or `.parquet` beside the images of a folder: boxes, captions, classes and splits."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.datasets.base import SPLITS, DataError
from pipeline.datasets.boxes import Box, coordinate
from pipeline.datasets.image_files import relative_path
from pipeline.datasets.text_table import decoded_lines, line_error

_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
COLUMNS = ("file_name", "box", *_CORNERS, "caption", "split", "label", "class_name")


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
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    images: dict[str, ImageMetadata] = {}
    for where, row in readers[path.suffix](path):
        try:
            name, image = _image(where, row)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if name in images:
            raise DataError(f"{where}: {name} is described by {images[name].where} already; each image may stand once")
        images[name] = image
    return images


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader((line + "\n" for line in decoded_lines(path)), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            if header is None:
                header = [name.strip() for name in fields]
                if "file_name" not in header or len(set(header)) != len(header):
                    raise line_error(path, start, "expected a header that names the column file_name, each name once")
            elif fields:
                if len(fields) != len(header):
                    raise line_error(path, start, f"expected {len(header)} fields, found {len(fields)}")
                yield f"{path} line {start}", dict(zip(header, fields, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise line_error(path, start, f"not CSV: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(decoded_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise line_error(path, number, f"not JSON: {error}") from None
        if not isinstance(row, dict):
            raise line_error(path, number, 'expected an object like {"file_name": …}')
        yield f"{path} line {number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Other columns may hold the images themselves; "bbox" is asked for to be refused.
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in (*COLUMNS, "bbox")]
            rows = file.read(columns=columns).to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _image(where: str, row: dict[str, Any]) -> tuple[str, ImageMetadata]:
    if "bbox" in row:
        raise ValueError("bbox has several meanings; name it box for [x0, y0, x1, y1], or xmin, ymin, xmax and ymax")
    file_name = _text(row, "file_name")
    if file_name is None:
        raise ValueError("has no file_name; expected the path of an image relative to this file")
    split = _text(row, "split")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    class_name = _text(row, "class_name") or _text(row, "label")
    return relative_path(file_name), ImageMetadata(where, class_name, split, _box(row), _text(row, "caption") or "")


def _text(row: dict[str, Any], column: str) -> str | None:
    """A value as text; whole numbers, as labels may be, too. Empty text, null and NaN are None."""
    value = row.get(column)
    if isinstance(value, float) and (value.is_integer() or value != value):
        # What a table library makes of whole numbers beside missing ones.
        value = None if value != value else int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{column} is {type(value).__name__}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{column} holds half of a surrogate pair; it is not valid text") from None
    return value.strip() or None


def _box(row: dict[str, Any]) -> Box | None:
    corners: Any = row.get("box")
    if isinstance(corners, str) and corners.strip():
        try:
            corners = json.loads(corners)
        except (ValueError, RecursionError):
            corners = corners.replace(",", " ").split()
    if corners is None or corners == "" or (isinstance(corners, str) and not corners.strip()):
        separate = [row.get(corner) for corner in _CORNERS]
        missing = [value is None or value == "" or value != value for value in separate]
        if all(missing):
            return None
        if any(missing):
            raise ValueError(f"has no {_CORNERS[missing.index(True)]}; a box needs {', '.join(_CORNERS)}")
        corners = separate
    if not isinstance(corners, list) or len(corners) != 4:
        raise ValueError("box is not a list of four numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = (coordinate(value) for value in corners)
    return x0, y0, x1, y1

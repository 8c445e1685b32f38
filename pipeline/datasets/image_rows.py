"""Tables with a row per image: CSV, JSON lines or Parquet, with boxes and captions in them."""

import csv
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pipeline.datasets.base import DataError
from pipeline.datasets.boxes import Box, coordinate
from pipeline.datasets.text_table import LONGEST_LINE, decoded_lines, line_error

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
# Under one of these names a table has captions; the first that says something is used.
CAPTIONS = ("caption", "text")
LONGEST_ROW = 1 << 28  # bytes; a row may hold a whole image in a column that nobody reads
_NAMED = 12
_SHOWN = 80  # characters of a header

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class RowTable:
    """A table with where each row stands ("file line 3") and its values by column, unchecked, of the columns read.

    unread: its other columns, in the order in which they were met.
    """

    rows: list[tuple[str, Row]]
    unread: tuple[str, ...]


def read_rows(path: Path, columns: Collection[str], keys: Collection[str]) -> RowTable:
    """Read some columns of a table; blank lines are skipped.

    columns: those to read; others may hold anything, such as the images themselves. keys: one of these a CSV header
    must name. Raises DataError naming file and line.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{path}: expected a file that ends in {', '.join(TABLE_SUFFIXES)}")
    if suffix == ".parquet":
        return _parquet_rows(path, columns)
    unread: dict[str, None] = {}
    rows = []
    for where, row in _csv_rows(path, keys) if suffix == ".csv" else _jsonl_rows(path, keys):
        unread |= dict.fromkeys(name for name in row if name not in columns)
        rows.append((where, {name: value for name, value in row.items() if name in columns}))
    return RowTable(rows, tuple(unread))


def say_unread(path: Path, table: RowTable, columns: Collection[str], note: Callable[[str], None]) -> None:
    """Name the columns of a table that nobody reads, in one line, where there are any."""
    if table.unread:
        named = ", ".join(name or "(no name)" for name in table.unread[:_NAMED])
        more = f" and {len(table.unread) - _NAMED} more" if len(table.unread) > _NAMED else ""
        note(f"{path}: columns that are not read: {named}{more}; read are {', '.join(columns)}")


def _csv_rows(path: Path, keys: Collection[str]) -> Iterator[tuple[str, Row]]:
    # The limit is the process's; lines are bounded anyway, and a field is no longer than its line.
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader((line + "\n" for line in decoded_lines(path, LONGEST_ROW)), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            if header is None:
                header = [name.strip() for name in fields]
                if not set(keys) & set(header) or len(set(header)) != len(header):
                    wanted = f"expected a header that names the column {' or '.join(keys)}, each name once"
                    raise line_error(path, start, f"{wanted}, with commas between; found {','.join(header)[:_SHOWN]!r}")
            elif fields:
                if len(fields) != len(header):
                    raise line_error(path, start, f"expected {len(header)} fields, found {len(fields)}")
                yield f"{path} line {start}", dict(zip(header, fields, strict=True))
            start = reader.line_num + 1
    except csv.Error as error:
        raise line_error(path, start, f"not CSV: {error}") from None


def _jsonl_rows(path: Path, keys: Collection[str]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(decoded_lines(path, LONGEST_ROW), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise line_error(path, number, f"not JSON: {error}") from None
        if not isinstance(row, dict):
            raise line_error(path, number, f'expected an object like {{"{next(iter(keys))}": …}}')
        yield f"{path} line {number}", row


def _parquet_rows(path: Path, columns: Collection[str]) -> RowTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            rows = file.read(columns=[name for name in names if name in columns]).to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from None
    unread = tuple(name for name in names if name not in columns)
    return RowTable([(f"{path} row {number}", row) for number, row in enumerate(rows, start=1)], unread)


def text_of(row: Row, column: str) -> str | None:
    """A value as text; whole numbers, as labels may be, too. Empty text, null and NaN are None.

    Raises ValueError for what is no text.
    """
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
    if len(value) > LONGEST_LINE:
        raise ValueError(f"{column} is {len(value)} characters long; expected at most {LONGEST_LINE}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{column} holds half of a surrogate pair; it is not valid text") from None
    return value.strip() or None


def caption_text(row: Row) -> str | None:
    """The caption of a row, from the first of `CAPTIONS` that says something. Raises ValueError for what is no text."""
    return next((text for name in CAPTIONS if (text := text_of(row, name)) is not None), None)


def box_of(row: Row) -> Box | None:
    """The box of a row, from `box` ([x0, y0, x1, y1], also as text) or from its four `CORNERS`; None without one.

    Raises ValueError for a box that is no box, and for the ambiguous column `bbox`.
    """
    if "bbox" in row:
        raise ValueError("bbox has several meanings; name it box for [x0, y0, x1, y1], or xmin, ymin, xmax and ymax")
    corners: Any = row.get("box")
    if isinstance(corners, str) and corners.strip():
        try:
            corners = json.loads(corners)
        except (ValueError, RecursionError):
            corners = corners.replace(",", " ").split()
    if corners is None or corners == "" or (isinstance(corners, str) and not corners.strip()):
        separate = [row.get(corner) for corner in CORNERS]
        missing = [value is None or value == "" or value != value for value in separate]
        if all(missing):
            return None
        if any(missing):
            raise ValueError(f"has no {CORNERS[missing.index(True)]}; a box needs {', '.join(CORNERS)}")
        corners = separate
    if not isinstance(corners, list) or len(corners) != 4:
        raise ValueError("box is not a list of four numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = (coordinate(value) for value in corners)
    return x0, y0, x1, y1

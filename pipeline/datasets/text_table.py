"""Text files of the form `id value …`, a line per entry, as CUB-200-2011 and NABirds are described by."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.datasets.base import DataError

LONGEST_LINE = 65_536  # bytes; the longest line of an official file has under 200
# Only these separate fields: str.split would also cut at the no-break space of a Latin-1 name.
_BLANKS = " \t"
_SEPARATOR = re.compile(f"[{_BLANKS}]+")


@dataclass(frozen=True)
class Line:
    """One entry of a table: its fields, and where it stands so that an error can say so."""

    path: Path
    number: int
    fields: tuple[str, ...]

    def error(self, problem: str) -> DataError:
        """The error to raise for this line."""
        return line_error(self.path, self.number, problem)

    def whole_number(self, column: int, what: str) -> int:
        """Field `column` as a number without sign. Raises DataError that calls the field `what`."""
        field = self.fields[column]
        if not (field.isascii() and field.isdigit() and len(field) < 10):
            raise self.error(f"{what} {field!r} is not a whole number")
        return int(field)


def line_error(path: Path, number: int, problem: str) -> DataError:
    """An error about one line of a file, in the words that every reader here uses."""
    return DataError(f"{path} line {number}: {problem}")


def decoded_lines(path: Path, longest: int = LONGEST_LINE) -> Iterator[str]:
    """The lines of a text file without their ends (LF or CRLF) and without a byte order mark, blank ones included.

    A line is UTF-8; where it is not, Latin-1, which is what old data sets have names in. Raises DataError for a file
    that cannot be read, is not such a text, or has a line of more than `longest` bytes.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(longest + 1):
                number += 1
                if number == 1:
                    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise line_error(path, number, "begins UTF-16 text; save the file as UTF-8")
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if len(raw) > longest:
                    raise line_error(path, number, f"longer than {longest} bytes; this is not the official file")
                if b"\0" in raw:
                    raise line_error(path, number, "holds a zero byte; this is not a text file")
                raw = raw.removesuffix(b"\n").removesuffix(b"\r")
                try:
                    yield raw.decode("utf-8")
                except UnicodeDecodeError:
                    yield raw.decode("latin-1")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_table(path: Path, columns: Sequence[str], *, last_is_text: bool = False) -> dict[str, Line]:
    """Read a table of entries by their first field, in the file's order; blank lines are skipped.

    columns: what the fields are, for messages; their number is required of every line. last_is_text: the last field
    is the rest of the line and may hold blanks. Raises DataError that names the file and the line.
    """
    entries: dict[str, Line] = {}
    for number, text in enumerate(decoded_lines(path), start=1):
        text = text.strip(_BLANKS)
        if not text:
            continue
        fields = tuple(_SEPARATOR.split(text, maxsplit=len(columns) - 1 if last_is_text else 0))
        line = Line(path, number, fields)
        if len(fields) != len(columns):
            raise line.error(f"expected {len(columns)} fields ({' '.join(columns)}), found {len(fields)}")
        first = entries.setdefault(fields[0], line)
        if first is not line:
            raise line.error(f"{columns[0]} {fields[0]!r} is on line {first.number} already; each may stand once")
    if not entries:
        raise DataError(f"{path}: has no entry; expected lines of {' '.join(columns)}")
    return entries

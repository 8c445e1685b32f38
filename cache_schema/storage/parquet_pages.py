"""The page headers of a Parquet file, looked at before a reader believes them and makes room for what they say.

pyarrow checks a footer against limits and takes the headers between the pages at their word.
Sources: https://parquet.apache.org/docs/file-format/ with its parquet.thrift, and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from dataclasses import dataclass
from typing import Union

from cache_schema.errors import CacheCorrupt

# A header takes tens of bytes; statistics of its page may have two texts in it.
_MAX_HEADER = 1 << 20
_MAX_DEPTH = 8
# Usual writers end a page after 1 MB or 20 000 rows, and every row takes tens of bytes in some column.
_FREE_PAGES, _BYTES_PER_PAGE = 64, 4096

_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
# PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED and RLE_DICTIONARY: those of `cache_schema.storage.parquet`.
_ENCODINGS = {0, 2, 3, 4, 8}

# A decoded Thrift struct: the integers and structs in it by their field numbers, anything else left out.
_Struct = dict[int, Union[int, "_Struct"]]


@dataclass(frozen=True)
class ColumnChunk:
    """What a footer says about one column of one row group: where its pages are, and what is in them all together."""

    name: str
    start: int
    end: int
    values: int
    expanded: int


def check_pages(data: bytes, chunk: ColumnChunk) -> None:
    """Raise CacheCorrupt unless the pages of a column fill its place and hold no more than the footer says."""
    if not chunk.values:
        return  # nothing is read of such a column, and of empty tables the places are not filled in
    place, pages, values, expanded = chunk.start, 0, 0, 0
    while place < chunk.end:
        header = _Header(data, place, min(chunk.end, place + _MAX_HEADER), chunk.name)
        fields = header.struct()
        size, stored = header.number(fields, 2), header.number(fields, 3)
        kind, count, encoding = _describe(header, fields)
        expanded += header.place - place + size
        pages += 1
        if kind == _DICTIONARY_PAGE:
            # A value takes one byte at least, and a reader makes room for all of them first.
            sound = count <= size and pages == 1
        else:
            values += count
            sound = values <= chunk.values
        if not sound or encoding not in _ENCODINGS or expanded > chunk.expanded:
            raise CacheCorrupt(f"a page of column {chunk.name} contradicts the metadata")
        if pages > _FREE_PAGES + len(data) // _BYTES_PER_PAGE:
            raise CacheCorrupt(f"column {chunk.name} has more pages than a file of {len(data)} bytes may have")
        place = header.place + stored
    # With fewer values a reader might look for more behind the end.
    if place != chunk.end or values != chunk.values:
        raise CacheCorrupt(f"the pages of column {chunk.name} do not end where the metadata says")


def _describe(header: "_Header", fields: _Struct) -> tuple[int, int, int]:
    """Return the type of a page, the number of values in it and their encoding."""
    kind = header.number(fields, 1)
    of_kind = {_DATA_PAGE: (5, 2), _DICTIONARY_PAGE: (7, 2), _DATA_PAGE_V2: (8, 4)}
    if kind not in of_kind:
        raise CacheCorrupt(f"column {header.name} has a page of unknown type {kind}")
    number, encoding = of_kind[kind]
    described = fields.get(number)
    if not isinstance(described, dict):
        raise CacheCorrupt(f"a page of column {header.name} does not say what is in it")
    return kind, header.number(described, 1), header.number(described, encoding)


class _Header:
    """A page header in Thrift's compact protocol, read from `place` on; never looks at `end` or beyond."""

    def __init__(self, data: bytes, place: int, end: int, name: str) -> None:
        self._data, self.place, self._end, self.name = data, place, end, name

    def number(self, fields: _Struct, field: int) -> int:
        """Return a field that must be there and not be negative."""
        value = fields.get(field)
        if not isinstance(value, int) or value < 0:
            raise self._damage()
        return value

    def struct(self, depth: int = 0) -> _Struct:
        """Read a struct to its end."""
        if depth > _MAX_DEPTH:
            raise self._damage()
        fields: _Struct = {}
        field = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            field = field + step if step else self._signed()
            value = self._value(kind, depth)
            if value is not None:
                fields[field] = value
        return fields

    def _value(self, kind: int, depth: int) -> "int | _Struct | None":
        if kind in (1, 2):  # true and false have no more bytes
            return None
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 12:
            return self.struct(depth + 1)
        if kind == 7:
            self._skip(8)
        elif kind == 8:
            self._skip(self._varint())
        else:
            # Page headers have no lists, sets or maps.
            raise self._damage()
        return None

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise self._damage()
        return value | byte << shift

    def _byte(self) -> int:
        self._skip(1)
        return self._data[self.place - 1]

    def _skip(self, size: int) -> None:
        if size > self._end - self.place:
            raise self._damage()
        self.place += size

    def _damage(self) -> CacheCorrupt:
        return CacheCorrupt(f"column {self.name} has a page header that cannot be read")

"""Reading a Parquet file that a stranger may have made: what it promises must be in proportion to its size.

Source: https://parquet.apache.org/docs/file-format/.
"""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache_schema.errors import CacheCorrupt
from cache_schema.storage.parquet_pages import ColumnChunk, check_pages

_MAGIC = b"PAR1"
_TAIL = 8
# Metadata is about 1.5 kB for 65 536 rows, which take megabytes; more room is for statistics with long captions.
_FOOTER_BYTES, _FOOTER_SHARE = 1 << 20, 64
_MAX_FOOTER_ITEMS = 1 << 16
# A table in memory may be this many times as large as its file. Long captions that are all the same come to 100 times,
# because the checksum of every image takes 32 bytes at least; a decompression bomb comes to thousands.
_MAX_EXPANSION, _FREE_BYTES = 256, 64 << 20
_BATCH_ROWS = 4096
# How this project and other usual writers encode; DELTA_BYTE_ARRAY makes long values of nothing.
_ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}


def read_trusting_nothing(data: bytes, expected: Callable[[pa.Schema], pa.Schema]) -> pa.Table:
    """Read the table in the bytes of a Parquet file, which must have the columns that are expected of it.

    `expected`: from the columns that the file says it has to those that it must have, which may then be as many.
    The memory this takes is at most a multiple of their number. Raises CacheCorrupt for a table that cannot be in so
    few bytes or has other columns, pyarrow's exceptions and OSError for what is no Parquet file.
    """
    size = len(data)
    limit = _FREE_BYTES + _MAX_EXPANSION * size
    _check_footer_size(data)
    bounds = {"thrift_string_size_limit": size, "thrift_container_size_limit": _MAX_FOOTER_ITEMS}
    metadata = pq.ParquetFile(pa.BufferReader(data), **bounds).metadata
    found = metadata.schema.to_arrow_schema()
    schema = expected(found)
    _check_schema(found, schema)
    for chunk in _column_chunks(metadata, schema, size, limit):
        check_pages(data, chunk)
    # Equal texts stay one text until it is known how much they come to.
    text = [field.name for field in schema if pa.types.is_string(field.type)]
    file = pq.ParquetFile(pa.BufferReader(data), metadata=metadata, read_dictionary=text, **bounds)
    batches, total = [], 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
        total += _expanded_bytes(batch)
        if total > limit:
            raise CacheCorrupt(f"it expands to more than {limit} bytes, which a file of {size} bytes may not")
        batches.append(_with_plain_text(batch, schema))
    table = pa.Table.from_batches(batches, schema=schema if not batches else batches[0].schema)
    if table.num_rows != metadata.num_rows:
        raise CacheCorrupt(f"it has {table.num_rows} rows and says {metadata.num_rows}")
    return table


def _check_footer_size(data: bytes) -> None:
    size = len(data)
    if size < _TAIL + len(_MAGIC) or data[-len(_MAGIC) :] != _MAGIC:
        raise CacheCorrupt("it does not end as a Parquet file does")
    footer = int.from_bytes(data[-_TAIL : -len(_MAGIC)], "little")
    if footer > min(size, _FOOTER_BYTES + size // _FOOTER_SHARE):
        raise CacheCorrupt(f"its metadata is said to take {footer} of its {size} bytes")


def _check_schema(found: pa.Schema, schema: pa.Schema) -> None:
    if found.equals(schema):
        return
    types = {field.name: field.type for field in found}
    wrong = [field.name for field in schema if types.get(field.name) != field.type]
    columns = ", ".join(wrong) or f"{len(found.names)} columns in another order or with others between them"
    raise CacheCorrupt(f"it does not have the columns of the schema: {columns}")


def _column_chunks(metadata: pq.FileMetaData, schema: pa.Schema, size: int, limit: int) -> list[ColumnChunk]:
    """Return where the columns' pages are and what is in them, as far as the metadata can be true."""
    chunks: list[ColumnChunk] = []
    rows = 0
    for group in range(metadata.num_row_groups):
        found = metadata.row_group(group)
        rows += found.num_rows
        if found.num_columns != len(schema):
            raise CacheCorrupt(f"it is said to have {found.num_columns} columns in some rows")
        # Their names stand here once more, and may be anything.
        for number, field in enumerate(schema):
            column, name = found.column(number), field.name
            start = column.data_page_offset
            if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
                start = column.dictionary_page_offset
            if not 0 <= column.total_compressed_size <= size or not 0 <= start <= size - column.total_compressed_size:
                raise CacheCorrupt(f"column {name} is said to lie outside of the file")
            strange = set(column.encodings) - _ENCODINGS
            if strange or column.total_uncompressed_size < 0:
                raise CacheCorrupt(f"column {name} is encoded in a way that is not read here")
            width = field.type.list_size if pa.types.is_fixed_size_list(field.type) else 1
            if not 0 <= column.num_values <= width * found.num_rows:
                raise CacheCorrupt(f"column {name} is said to have more values than rows")
            end = start + column.total_compressed_size
            chunks.append(ColumnChunk(name, start, end, column.num_values, column.total_uncompressed_size))
    expanded = sum(chunk.expanded for chunk in chunks)
    # Every row has an id of its own and the checksum of an image: it takes more than one byte.
    if rows != metadata.num_rows or not 0 <= rows <= size or expanded > limit:
        raise CacheCorrupt(f"{metadata.num_rows} rows of {expanded} bytes cannot be in a file of {size} bytes")
    return chunks


def _expanded_bytes(batch: pa.RecordBatch) -> int:
    """Return the bytes of a batch with every text spelled out."""
    total = 0
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            lengths = pc.binary_length(column.dictionary)
            total += 4 * len(column) + (pc.sum(pc.cast(pc.take(lengths, column.indices), pa.int64())).as_py() or 0)
        else:
            total += column.nbytes
    return total


def _with_plain_text(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    fields = [
        schema.field(name) if column.type == schema.field(name).type else pa.field(name, column.type)
        for name, column in zip(batch.schema.names, columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))

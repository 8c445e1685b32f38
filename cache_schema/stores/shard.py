"""Shard files of the Zarr v3 `sharding_indexed` codec: written deterministically, parsed without trust.

A shard file is the chunks in C order, row after row, then the index (one little-endian uint64 offset and length per
chunk, all ones where the chunk is missing), then the CRC-32C of the index.
Source: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt
from cache_schema.format.layout import ArrayLayout
from cache_schema.storage.checksum import Bytes, crc32c
from cache_schema.storage.files import AsideFile
from cache_schema.stores.compression import compress, max_compressed

_MISSING = np.uint64(0xFFFFFFFFFFFFFFFF)
_CRC_BYTES = 4


@dataclass
class ShardWriter:
    """Writes one shard into a file, row by row; every row has the shape (V, T, *inner)."""

    layout: ArrayLayout
    file: AsideFile
    piece_crc32c: list[int] = field(default_factory=list)
    _places: list[tuple[int, int]] = field(default_factory=list)

    def add_row(self, row: Array) -> None:
        """Append the chunks of one sample."""
        data = np.ascontiguousarray(row, dtype=np.dtype(self.layout.dtype).newbyteorder("<"))
        expected = self.layout.row_shape
        if data.shape != expected:
            raise ValueError(f"row of shape {data.shape}, expected {expected}")
        plain = self.layout.compression == "none"
        self.add_chunks(
            chunk.view(np.uint8).data if plain else compress(chunk, self.layout.compression)
            for chunk in data.reshape(math.prod(expected[:2]), -1)
        )

    def add_chunks(self, chunks: Iterable[Bytes]) -> None:
        """Append the chunks of one sample as they are to lie in the file."""
        for piece in chunks:
            self._places.append((self.file.size, len(piece)))
            checksum = crc32c(piece)
            self.piece_crc32c.append(checksum)
            self.file.write(piece, checksum)

    def skip_row(self) -> None:
        """Mark the chunks of one sample as missing."""
        chunks = math.prod(self.layout.outer[1:])
        self._places += [(int(_MISSING), int(_MISSING))] * chunks
        self.piece_crc32c += [0] * chunks

    def finish(self) -> None:
        """Append the index; chunks of rows that were not added are marked as missing."""
        index = np.full((math.prod(self.layout.chunks_per_shard), 2), _MISSING, dtype="<u8")
        index[: len(self._places)] = np.array(self._places, dtype="<u8").reshape(-1, 2)
        data = index.tobytes()
        self.file.write(data)
        self.file.write(crc32c(data).to_bytes(_CRC_BYTES, "little"))


@dataclass(frozen=True)
class ShardIndex:
    """Where the chunks of a shard are: offsets and lengths in bytes, int64 (S, V, T); offset -1 where missing."""

    offsets: Array
    lengths: Array

    @property
    def nbytes(self) -> int:
        """The memory this index takes."""
        return self.offsets.nbytes + self.lengths.nbytes


def index_size(layout: ArrayLayout) -> int:
    """Return the size in bytes of a shard's index and its checksum."""
    return 16 * math.prod(layout.chunks_per_shard) + _CRC_BYTES


def chunk_bytes(layout: ArrayLayout) -> int:
    """Return the size in bytes of one decoded chunk."""
    return math.prod(layout.inner) * np.dtype(layout.dtype).itemsize


def parse_index(data: bytes, layout: ArrayLayout, file_size: int, where: str) -> ShardIndex:
    """Parse the last `index_size(layout)` bytes of a shard file of `file_size` bytes.

    Every chunk of the result lies inside the file, before the index, overlaps no other, and has the size of a chunk:
    exactly without compression, at most slightly more with it. Raises CacheCorrupt otherwise; `where` names the file in
    the message.
    """
    if len(data) != index_size(layout) or file_size < len(data):
        raise CacheCorrupt(f"{where} is truncated: {file_size} bytes do not hold the index of its chunks")
    if crc32c(data[:-_CRC_BYTES]) != int.from_bytes(data[-_CRC_BYTES:], "little"):
        raise CacheCorrupt(f"the chunk index of {where} is damaged (checksum)")
    table = np.frombuffer(data, dtype="<u8", count=2 * math.prod(layout.chunks_per_shard)).reshape(-1, 2)
    offsets, lengths = table[:, 0], table[:, 1]
    present = (offsets != _MISSING) | (lengths != _MISSING)
    limit = np.uint64(file_size - len(data))
    # Written so that no sum can wrap around.
    inside = (lengths <= limit) & (offsets <= limit - np.minimum(lengths, limit))
    if layout.compression == "none":
        inside &= lengths == np.uint64(chunk_bytes(layout))
    else:
        inside &= (lengths > 0) & (lengths <= np.uint64(max_compressed(chunk_bytes(layout))))
    if not (inside | ~present).all():
        raise CacheCorrupt(f"the chunk index of {where} points outside the file or to chunks of the wrong size")
    if _overlap(offsets[present], lengths[present]):
        raise CacheCorrupt(f"the chunk index of {where} points to chunks that overlap")
    shape = layout.chunks_per_shard
    return ShardIndex(
        np.where(present, offsets, _MISSING).astype(np.int64).reshape(shape),
        np.where(present, lengths, 0).astype(np.int64).reshape(shape),
    )


def _overlap(offsets: Array, lengths: Array) -> bool:
    """Say whether any two chunks, given in any order and all inside a file, share a byte."""
    if (offsets[1:] < offsets[:-1]).any():
        order = np.argsort(offsets, kind="stable")
        offsets, lengths = offsets[order], lengths[order]
    return bool((offsets[1:] < offsets[:-1] + lengths[:-1]).any())

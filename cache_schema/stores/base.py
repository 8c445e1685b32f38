"""What differs between the ways to store features, behind one interface: Zarr arrays, or WebDataset tars."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import pyarrow as pa

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt
from cache_schema.format import layout
from cache_schema.format.journal import FileRecord, Record, record_name
from cache_schema.format.layout import ArrayLayout, CalibrationLayout
from cache_schema.format.manifest import Manifest
from cache_schema.storage.files import AsideFile
from cache_schema.storage.folder import ReadableFile
from cache_schema.storage.local import LocalFolder
from cache_schema.stores.shard import ShardIndex


class PieceChecksums(NamedTuple):
    """The CRC-32C of the pieces of an array in a shard, or of an image tar, one after the other, as uint32.

    A piece is `chunks` chunks as they lie in the file: one or, in caches that schema version 1 wrote, those of a row.
    """

    values: memoryview
    chunks: int


class RowWriter(Protocol):
    """Writes one shard into files aside, one row after the other, each complete."""

    @property
    def asides(self) -> list[AsideFile]:
        """The files of the shard, to be published together."""

    def add_row(self, parts: Mapping[str, Array]) -> None:
        """Append a sample: for the name of every array of the cache, its stored values (V, T, *inner)."""

    def add_failed_row(self) -> None:
        """Append a sample that has no features."""

    def finish(self) -> dict[str, FileRecord]:
        """Complete the files, still aside, and return the record of each."""


class FeatureStore(ABC):
    """How the features of one cache lie in files. All paths are relative to the cache."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    @abstractmethod
    def documents(self) -> dict[str, bytes]:
        """Return the metadata files that other readers need, path to contents."""

    @abstractmethod
    def shard_files(self, shard: int) -> dict[str, list[ArrayLayout]]:
        """Return the files of a shard and the arrays in each, in the order of their checksums in the journal."""

    @abstractmethod
    def array_file(self, array: ArrayLayout, shard: int) -> str:
        """Return the path of the file that holds a shard of an array."""

    @abstractmethod
    def read_index(self, file: ReadableFile, array: ArrayLayout, shard: int) -> ShardIndex:
        """Return where the chunks of an array are in an open shard file; raises CacheCorrupt."""

    def check_frame(self, file: ReadableFile, shard: int) -> None:  # noqa: B027 -- not every store has one
        """Raise CacheCorrupt unless an open shard file is, around the features, what this store writes."""

    @abstractmethod
    def row_writer(
        self, folder: LocalFolder, shard: int, samples: pa.Table
    ) -> contextlib.AbstractContextManager[RowWriter]:
        """Return the writer of one shard; leaving its context removes what was not published."""

    @abstractmethod
    def calibration_file(self, array: CalibrationLayout) -> str:
        """Return the path of a statistic's values."""

    @abstractmethod
    def render_calibration(self, array: CalibrationLayout, values: Array) -> bytes:
        """Return the contents of a statistic's file."""

    @abstractmethod
    def parse_calibration(self, array: CalibrationLayout, data: bytes, where: str) -> Array:
        """Return the values, float32, in the contents of a statistic's file; raises CacheCorrupt."""

    @abstractmethod
    def calibration_size(self, array: CalibrationLayout) -> int:
        """Return the size in bytes of a statistic's file."""

    def piece_checksums(self, record: Record, array: ArrayLayout) -> PieceChecksums:
        """Return the checksums of an array in a shard; raises CacheCorrupt for a record that does not fit the cache.

        Missing chunks have the checksum 0, which is that of no bytes.
        """
        name = self.array_file(array, record.shard)
        rows = layout.rows_of_shard(record.shard, array.samples_per_shard, array.outer[0])
        arrays = self.shard_files(record.shard)[name]
        checksums = record.files[name].piece_checksums() if name in record.files else None
        per_row = array.outer[1] * array.outer[2]
        each = len(rows) * per_row
        if checksums is not None and record.rows == (rows.start, rows.stop):
            if len(checksums) == each * len(arrays):
                start = each * [other.name for other in arrays].index(array.name)
                return PieceChecksums(checksums[start : start + each].data, 1)
            if len(checksums) == len(rows) and len(arrays) == 1:
                return PieceChecksums(checksums.data, per_row)
        raise CacheCorrupt(f"{record_name('features', record.shard)} does not have the checksums of {name}")

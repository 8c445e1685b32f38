"""Features as WebDataset shards: tar files in which every sample has one `.npy` member per array, and a `.json`.

`webdataset` and any tar tool can read them. This project's reader does not even look at the headers: the members have
the same names, order and sizes in every sample, so where each chunk is follows from the manifest alone, and a file of
any other size is damaged. Samples that the teacher failed on hold zeros and say `"failed": true`.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt, CacheError
from cache_schema.format import layout
from cache_schema.format.identity import canonical_json
from cache_schema.format.journal import FileRecord, file_record
from cache_schema.format.layout import ArrayLayout, CalibrationLayout
from cache_schema.format.manifest import Manifest
from cache_schema.storage import tar
from cache_schema.storage.checksum import crc32c
from cache_schema.storage.files import AsideFile
from cache_schema.storage.folder import ReadableFile
from cache_schema.storage.local import LocalFolder
from cache_schema.stores.base import FeatureStore, RowWriter
from cache_schema.stores.shard import ShardIndex, chunk_bytes

# Numpy pads the header of a .npy file to a multiple of 64 bytes and leaves room for the first axis to grow: with at
# most five axes of the sizes a manifest allows, that is always this many.
_NPY_HEADER = 128
# A sample's .json takes one block, whatever it says.
_JSON_MEMBER = 2 * tar.BLOCK


class WebDatasetStore(FeatureStore):
    """One tar per shard; per sample and array a member (V, T, *inner), then the sample's row, label and split."""

    def documents(self) -> dict[str, bytes]:
        """Return nothing: a tar describes itself."""
        return {}

    def shard_files(self, shard: int) -> dict[str, list[ArrayLayout]]:
        """Return one file with all arrays."""
        return {_shard_file(shard): self._arrays}

    def array_file(self, array: ArrayLayout, shard: int) -> str:
        """Return the path of the shard's tar."""
        return _shard_file(shard)

    def read_index(self, file: ReadableFile, array: ArrayLayout, shard: int) -> ShardIndex:
        """Compute where the chunks of an array are; raises CacheCorrupt for a file of the wrong size."""
        rows = len(layout.rows_of_shard(shard, array.samples_per_shard, array.outer[0]))
        size = tar.archive_size(rows * self._sample_bytes)
        if file.size != size:
            raise CacheCorrupt(f"{file.path} is truncated or not of this cache: {file.size} bytes instead of {size}")
        shape, chunk = array.chunks_per_shard, chunk_bytes(array)
        first = self._starts[array.name] + tar.BLOCK + _NPY_HEADER
        chunks = np.arange(math.prod(shape[1:]), dtype=np.int64).reshape(1, *shape[1:])
        samples = np.arange(shape[0], dtype=np.int64).reshape(-1, 1, 1)
        offsets = first + samples * self._sample_bytes + chunks * chunk
        lengths = np.full(shape, chunk, dtype=np.int64)
        offsets[rows:], lengths[rows:] = -1, 0
        return ShardIndex(offsets, lengths)

    def check_frame(self, file: ReadableFile, shard: int) -> None:
        """Raise CacheCorrupt unless a tar has exactly the members of its shard, each with the right .npy header."""
        rows = layout.rows_of_shard(shard, self.manifest.store.samples_per_shard, self.manifest.dataset.feature_rows)
        tar.check_members(file, self._members(file, rows))

    def _members(self, file: ReadableFile, rows: range) -> Iterator[tuple[str, int]]:
        for number, row in enumerate(rows):
            start = number * self._sample_bytes
            for array in self._arrays:
                header = npy_header(array.dtype, array.row_shape)
                if file.read(start + self._starts[array.name] + tar.BLOCK, len(header)) != header:
                    raise CacheCorrupt(f"{file.path} does not have the .npy header of {array.name} of row {row}")
                yield f"{row:08d}.{array.name}.npy", _NPY_HEADER + array.row_bytes
            text = file.read(start + self._sample_bytes - tar.BLOCK, tar.BLOCK).rstrip(b"\0")
            try:
                described = json.loads(text)["row"]
            except (ValueError, RecursionError, KeyError, TypeError):
                described = None
            if described != row:
                raise CacheCorrupt(f"{file.path} does not have the .json of row {row}")
            yield f"{row:08d}.json", len(text)

    @contextlib.contextmanager
    def row_writer(self, folder: LocalFolder, shard: int, samples: pa.Table) -> Iterator[RowWriter]:
        """Write one tar with the label and split of every row as the samples table says them."""
        rows = layout.rows_of_shard(shard, self.manifest.store.samples_per_shard, self.manifest.dataset.feature_rows)
        table = samples.slice(rows.start, len(rows)).select(["label", "split"]).to_pylist()
        with folder.aside(_shard_file(shard)) as aside:
            descriptions = ({"row": row, **sample} for row, sample in zip(rows, table, strict=True))
            yield _TarRowWriter(_shard_file(shard), aside, self._arrays, descriptions)

    def calibration_file(self, array: CalibrationLayout) -> str:
        """Return the path of the statistic's .npy file."""
        return f"{layout.FEATURES_FOLDER}/{array.name}.npy"

    def render_calibration(self, array: CalibrationLayout, values: Array) -> bytes:
        """Return a .npy file of float32."""
        return npy_header("float32", array.shape) + np.ascontiguousarray(values, dtype="<f4").tobytes()

    def parse_calibration(self, array: CalibrationLayout, data: bytes, where: str) -> Array:
        """Return the values of a .npy file that has exactly the expected header: nothing in it is interpreted."""
        header = npy_header("float32", array.shape)
        if len(data) != len(header) + array.nbytes or not data.startswith(header):
            raise CacheCorrupt(f"{where} is not a .npy file of {array.shape} float32 values")
        return np.frombuffer(data, dtype="<f4", offset=len(header)).reshape(array.shape).copy()

    def calibration_size(self, array: CalibrationLayout) -> int:
        """Return the size of the header and the values."""
        return _NPY_HEADER + array.nbytes

    @cached_property
    def _arrays(self) -> list[ArrayLayout]:
        return layout.all_layouts(self.manifest)

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Where the member of each array begins within a sample."""
        ends = accumulate(map(_member_bytes, self._arrays), initial=0)
        return {array.name: start for array, start in zip(self._arrays, ends, strict=False)}

    @cached_property
    def _sample_bytes(self) -> int:
        return sum(map(_member_bytes, self._arrays)) + _JSON_MEMBER


class _TarRowWriter:
    def __init__(
        self, name: str, aside: AsideFile, arrays: list[ArrayLayout], descriptions: Iterator[dict[str, Any]]
    ) -> None:
        self._name = name
        self._aside = aside
        self._arrays = arrays
        self._descriptions = descriptions
        self._checksums: dict[str, list[int]] = {array.name: [] for array in arrays}

    @property
    def asides(self) -> list[AsideFile]:
        return [self._aside]

    def add_row(self, parts: Mapping[str, Array]) -> None:
        self._add(next(self._descriptions), parts)

    def add_failed_row(self) -> None:
        zeros = {array.name: np.zeros(array.row_shape, dtype=array.dtype) for array in self._arrays}
        self._add({**next(self._descriptions), "failed": True}, zeros)

    def finish(self) -> dict[str, FileRecord]:
        self._aside.write(tar.archive_end(self._aside.size))
        pieces = [checksum for checksums in self._checksums.values() for checksum in checksums]
        return {self._name: file_record(self._aside.finish(), pieces)}

    def _add(self, description: dict[str, Any], parts: Mapping[str, Array]) -> None:
        row = description["row"]
        for array in self._arrays:
            data = np.ascontiguousarray(parts[array.name], dtype=np.dtype(array.dtype).newbyteorder("<"))
            if data.shape != array.row_shape:
                raise ValueError(f"row of shape {data.shape}, expected {array.row_shape}")
            size = _NPY_HEADER + array.row_bytes
            header = tar.member_header(f"{row:08d}.{array.name}.npy", size)
            self._aside.write(header + npy_header(array.dtype, array.row_shape))
            for chunk in data.reshape(math.prod(array.outer[1:]), -1).view(np.uint8):
                checksum = crc32c(chunk.data)
                self._checksums[array.name].append(checksum)
                self._aside.write(chunk.data, checksum)
            self._aside.write(tar.padding(size))
        text = canonical_json(description).encode("ascii")
        assert len(text) <= tar.BLOCK
        self._aside.write(tar.member_header(f"{row:08d}.json", len(text)) + text + tar.padding(len(text)))


def check_member_sizes(manifest: Manifest) -> None:
    """Raise CacheError if a sample of some array is larger than a tar member can be."""
    for array in layout.all_layouts(manifest):
        if _NPY_HEADER + array.row_bytes > tar.MAX_MEMBER_BYTES:
            raise CacheError(
                f"one sample of {array.name} takes {array.row_bytes / 1e9:.1f} GB, more than the 8.6 GB that a member "
                "of a tar file can have; choose the zarr store, a smaller encoding, or fewer views or timesteps"
            )


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return what precedes the values in a little-endian .npy file of version 1.0, the same for every numpy.

    Source: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
    """
    descr = np.dtype(dtype).newbyteorder("<").str
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode("ascii")
    magic = b"\x93NUMPY\x01\x00"
    length = _NPY_HEADER - len(magic) - 2
    assert len(text) < length
    return magic + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def _shard_file(shard: int) -> str:
    return f"{layout.FEATURES_FOLDER}/{shard:05d}.tar"


def _member_bytes(array: ArrayLayout) -> int:
    return tar.BLOCK + tar.padded(_NPY_HEADER + array.row_bytes)

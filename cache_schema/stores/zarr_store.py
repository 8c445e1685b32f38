"""Features as Zarr v3 arrays with the `sharding_indexed` codec: one array per tap and part, one file per shard of it.

Source: https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html; the shard files are `cache_schema.stores.shard`.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt
from cache_schema.format import layout
from cache_schema.format.journal import FileRecord, file_record
from cache_schema.format.layout import ArrayLayout, CalibrationLayout
from cache_schema.format.manifest import Manifest
from cache_schema.storage.files import AsideFile
from cache_schema.storage.folder import ReadableFile
from cache_schema.storage.local import LocalFolder
from cache_schema.stores.base import FeatureStore, RowWriter
from cache_schema.stores.compression import codec_metadata
from cache_schema.stores.shard import ShardIndex, ShardWriter, index_size, parse_index


class ZarrStore(FeatureStore):
    """A group `features` of sharded arrays (N, V, T, *inner) and of small unsharded ones for the statistics."""

    def documents(self) -> dict[str, bytes]:
        """Return the `zarr.json` of the group and of every array."""
        documents = {
            f"{layout.FEATURES_FOLDER}/zarr.json": _json({"zarr_format": 3, "node_type": "group", "attributes": {}})
        }
        for array in layout.all_layouts(self.manifest):
            documents[f"{_folder(array.name)}/zarr.json"] = _json(_sharded_metadata(self.manifest, array))
        for calibration in layout.all_calibrations(self.manifest):
            documents[f"{_folder(calibration.name)}/zarr.json"] = _json(
                _calibration_metadata(self.manifest, calibration)
            )
        return documents

    def shard_files(self, shard: int) -> dict[str, list[ArrayLayout]]:
        """Return one file per array."""
        return {self.array_file(array, shard): [array] for array in layout.all_layouts(self.manifest)}

    def array_file(self, array: ArrayLayout, shard: int) -> str:
        """Return the path of the shard's key in the array's chunk grid."""
        return "/".join([_folder(array.name), "c", str(shard), "0", "0", *("0" for _ in array.inner)])

    def read_index(self, file: ReadableFile, array: ArrayLayout, shard: int) -> ShardIndex:
        """Read and parse the chunk index at the end of an open shard file; raises CacheCorrupt."""
        size = index_size(array)
        if file.size < size:
            raise CacheCorrupt(f"{file.path} is truncated: {file.size} bytes do not hold the index of its chunks")
        return parse_index(file.read(file.size - size, size), array, file.size, file.path)

    @contextlib.contextmanager
    def row_writer(self, folder: LocalFolder, shard: int, samples: pa.Table) -> Iterator[RowWriter]:
        """Write one file per array; the samples table is not needed."""
        with contextlib.ExitStack() as stack:
            writers = {
                name: ShardWriter(array, stack.enter_context(folder.aside(name)))
                for name, (array,) in self.shard_files(shard).items()
            }
            yield _ZarrRowWriter(writers)

    def calibration_file(self, array: CalibrationLayout) -> str:
        """Return the path of the array's one chunk."""
        return "/".join([_folder(array.name), "c", *("0" for _ in array.shape)])

    def render_calibration(self, array: CalibrationLayout, values: Array) -> bytes:
        """Return the values as little-endian float32."""
        return np.ascontiguousarray(values, dtype="<f4").tobytes()

    def parse_calibration(self, array: CalibrationLayout, data: bytes, where: str) -> Array:
        """Return the values of a chunk of exactly the right size."""
        if len(data) != array.nbytes:
            raise CacheCorrupt(f"{where} has {len(data)} bytes, {array.shape} values need {array.nbytes}")
        return np.frombuffer(data, dtype="<f4").reshape(array.shape).copy()

    def calibration_size(self, array: CalibrationLayout) -> int:
        """Return the size of the values: nothing else is in the file."""
        return array.nbytes


class _ZarrRowWriter:
    def __init__(self, writers: Mapping[str, ShardWriter]) -> None:
        self._writers = writers

    @property
    def asides(self) -> list[AsideFile]:
        return [writer.file for writer in self._writers.values()]

    def add_row(self, parts: Mapping[str, Array]) -> None:
        for writer in self._writers.values():
            writer.add_row(parts[writer.layout.name])

    def add_failed_row(self) -> None:
        for writer in self._writers.values():
            writer.skip_row()

    def finish(self) -> dict[str, FileRecord]:
        files = {}
        for name, writer in self._writers.items():
            writer.finish()
            files[name] = file_record(writer.file.finish(), writer.piece_crc32c)
        return files


def _folder(name: str) -> str:
    return f"{layout.FEATURES_FOLDER}/{name}"


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode("ascii")


def _sharded_metadata(manifest: Manifest, array: ArrayLayout) -> dict[str, Any]:
    shape = [*array.outer, *array.inner]
    codecs = [_bytes_codec(array.dtype), *codec_metadata(array.compression, np.dtype(array.dtype).itemsize)]
    sharding = {
        "chunk_shape": [1, 1, 1, *array.inner],
        "codecs": codecs,
        "index_codecs": [_bytes_codec("uint64"), {"name": "crc32c"}],
        "index_location": "end",
    }
    names = ["sample", "view", "timestep", "token", "channel"][: len(shape)]
    metadata = _array_metadata(shape, [*array.chunks_per_shard, *array.inner], array.dtype, names)
    metadata["codecs"] = [{"name": "sharding_indexed", "configuration": sharding}]
    metadata["attributes"] = {
        "part": array.part,
        "encoding": manifest.encoding.kind,
        "views": manifest.views,
        "timesteps": manifest.curriculum.timesteps,
    }
    return metadata


def _calibration_metadata(manifest: Manifest, array: CalibrationLayout) -> dict[str, Any]:
    shape = list(array.shape)
    metadata = _array_metadata(shape, shape, "float32", list(array.dimensions))
    metadata["codecs"] = [_bytes_codec("float32")]
    metadata["attributes"] = {"part": array.part}
    if "timestep" in array.dimensions:
        metadata["attributes"]["timesteps"] = manifest.curriculum.timesteps
    return metadata


def _array_metadata(shape: list[int], chunk: list[int], dtype: str, names: list[str]) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "dimension_names": names,
    }


def _bytes_codec(dtype: str) -> dict[str, Any]:
    # Zarr says nothing about the byte order of one-byte types.
    if np.dtype(dtype).itemsize == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}

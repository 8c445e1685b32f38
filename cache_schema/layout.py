"""Where everything in a cache lies, and the Zarr metadata of its arrays: pure functions of the manifest.

Zarr v3 with the `sharding_indexed` codec: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cache_schema.compression import codec_metadata
from cache_schema.manifest import Compression, Manifest, TapInfo

SAMPLES_NAME = "samples.parquet"
CARD_NAME = "README.md"
IMAGE_INDEX_NAME = "images/index.npy"

Part = Literal["payload", "scale"]
# "channel": amplitudes that scaled number formats are relative to. The others are those of PCA.
CalibrationPart = Literal["amplitude", "mean", "basis", "channel"]

# numpy's name of the type each encoding is stored as. Zarr-python has neither bfloat16 nor float8, so their bits are
# stored as unsigned integers.
PAYLOAD_DTYPES = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "uint16",
    "int8": "int8",
    "float8_e4m3": "uint8",
}


@dataclass(frozen=True)
class ArrayLayout:
    """A sharded array of shape (N, V, T, *inner): one chunk per (sample, view, timestep), S samples per shard."""

    folder: str
    part: Part
    dtype: str
    outer: tuple[int, int, int]
    inner: tuple[int, ...]
    samples_per_shard: int
    compression: Compression

    def shard_file(self, shard: int) -> str:
        """The path of a shard inside the cache."""
        return "/".join([self.folder, "c", str(shard), "0", "0", *("0" for _ in self.inner)])

    @property
    def chunks_per_shard(self) -> tuple[int, int, int]:
        """The chunks in a shard: (samples, views, timesteps)."""
        return (self.samples_per_shard, self.outer[1], self.outer[2])


@dataclass(frozen=True)
class CalibrationLayout:
    """A small float32 array, one chunk, with statistics of one tap."""

    folder: str
    part: CalibrationPart
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]

    @property
    def file(self) -> str:
        """The path of its one chunk inside the cache."""
        return "/".join([self.folder, "c", *("0" for _ in self.shape)])


def payload_layout(manifest: Manifest, tap: TapInfo) -> ArrayLayout:
    """Return the layout of a tap's encoded features, shape (N, V, T, L, C)."""
    return _layout(manifest, tap, "payload")


def feature_layouts(manifest: Manifest, tap: TapInfo) -> list[ArrayLayout]:
    """Return the layouts of everything that is stored per sample for one tap: payload and, where there are, scales."""
    parts: list[Part] = ["payload", "scale"] if manifest.encoding.scaled else ["payload"]
    return [_layout(manifest, tap, part) for part in parts]


def _layout(manifest: Manifest, tap: TapInfo, part: Part) -> ArrayLayout:
    payload = part == "payload"
    return ArrayLayout(
        folder=f"features/{tap.name}" + ("" if payload else ".scale"),
        part=part,
        dtype=PAYLOAD_DTYPES[manifest.encoding.kind] if payload else "float32",
        outer=(manifest.dataset.feature_rows, len(manifest.views), len(manifest.curriculum.timesteps)),
        inner=(tap.tokens, tap.channels) if payload else (tap.tokens,),
        samples_per_shard=manifest.store.samples_per_shard,
        compression=manifest.encoding.compression,
    )


def shard_files(manifest: Manifest, shard: int) -> list[str]:
    """Return the paths of every file of one feature shard."""
    return [layout.shard_file(shard) for tap in manifest.taps for layout in feature_layouts(manifest, tap)]


def calibration_layouts(manifest: Manifest, tap: TapInfo) -> list[CalibrationLayout]:
    """Return the layouts of the statistics that the encoding of a tap rests on; none for encodings without.

    Of PCA `amplitude` (C_teacher,), `mean` (C_teacher,) and `basis` (C, C_teacher); of scaled number formats `channel`
    (T, C).
    """
    arrays: list[tuple[CalibrationPart, tuple[int, ...], tuple[str, ...]]] = []
    if manifest.encoding.pca is not None:
        assert tap.teacher_channels is not None
        arrays += [
            ("amplitude", (tap.teacher_channels,), ("teacher_channel",)),
            ("mean", (tap.teacher_channels,), ("teacher_channel",)),
            ("basis", (tap.channels, tap.teacher_channels), ("channel", "teacher_channel")),
        ]
    if manifest.encoding.scaled:
        arrays.append(("channel", (len(manifest.curriculum.timesteps), tap.channels), ("timestep", "channel")))
    return [CalibrationLayout(f"features/{tap.name}.{part}", part, shape, names) for part, shape, names in arrays]


def calibration_files(manifest: Manifest) -> list[str]:
    """Return the paths of all statistics, of every tap."""
    return [array.file for tap in manifest.taps for array in calibration_layouts(manifest, tap)]


def image_file(shard: int) -> str:
    """Return the path of one shard of student images."""
    return f"images/{shard:05d}.tar"


def rows_of_shard(shard: int, per_shard: int, rows: int) -> range:
    """Return the rows of one shard; the last shard may be short."""
    return range(shard * per_shard, min((shard + 1) * per_shard, rows))


def zarr_documents(manifest: Manifest) -> dict[str, bytes]:
    """Return the Zarr v3 metadata files of a cache, path to contents."""
    documents = {"features/zarr.json": _json({"zarr_format": 3, "node_type": "group", "attributes": {}})}
    for tap in manifest.taps:
        for layout in feature_layouts(manifest, tap):
            documents[f"{layout.folder}/zarr.json"] = _json(_sharded_metadata(manifest, layout))
        for array in calibration_layouts(manifest, tap):
            documents[f"{array.folder}/zarr.json"] = _json(_calibration_metadata(manifest, array))
    return documents


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode("ascii")


def _sharded_metadata(manifest: Manifest, layout: ArrayLayout) -> dict[str, Any]:
    shape = [*layout.outer, *layout.inner]
    codecs = [_bytes_codec(layout.dtype), *codec_metadata(layout.compression, np.dtype(layout.dtype).itemsize)]
    sharding = {
        "chunk_shape": [1, 1, 1, *layout.inner],
        "codecs": codecs,
        "index_codecs": [_bytes_codec("uint64"), {"name": "crc32c"}],
        "index_location": "end",
    }
    names = ["sample", "view", "timestep", "token", "channel"][: len(shape)]
    metadata = _array_metadata(shape, [*layout.chunks_per_shard, *layout.inner], layout.dtype, names)
    metadata["codecs"] = [{"name": "sharding_indexed", "configuration": sharding}]
    metadata["attributes"] = {
        "part": layout.part,
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
    if dtype in ("int8", "uint8"):
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}

"""Where everything in a cache lies, and the Zarr metadata of its arrays: pure functions of the manifest.

Zarr v3 with the `sharding_indexed` codec: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from cache_schema.manifest import Manifest, TapInfo

SAMPLES_NAME = "samples.parquet"
CARD_NAME = "README.md"
IMAGE_INDEX_NAME = "images/index.npy"
ZSTD_LEVEL = 3

Part = Literal["payload", "scale"]

# numpy's name of the type each encoding is stored as. Zarr-python has no bfloat16, so its bits are stored as uint16.
PAYLOAD_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "int8": "int8"}


@dataclass(frozen=True)
class ArrayLayout:
    """A sharded array of shape (N, V, T, *inner): one chunk per (sample, view, timestep), S samples per shard."""

    folder: str
    part: Part
    dtype: str
    outer: tuple[int, int, int]
    inner: tuple[int, ...]
    samples_per_shard: int
    compression: str

    def shard_file(self, shard: int) -> str:
        """The path of a shard inside the cache."""
        return "/".join([self.folder, "c", str(shard), "0", "0", *("0" for _ in self.inner)])

    @property
    def chunks_per_shard(self) -> tuple[int, int, int]:
        """The chunks in a shard: (samples, views, timesteps)."""
        return (self.samples_per_shard, self.outer[1], self.outer[2])


def payload_layout(manifest: Manifest, tap: TapInfo) -> ArrayLayout:
    """Return the layout of a tap's encoded features, shape (N, V, T, L, C)."""
    return _layout(manifest, tap, "payload")


def feature_layouts(manifest: Manifest, tap: TapInfo) -> list[ArrayLayout]:
    """Return the layouts of everything that is stored per sample for one tap: payload and, for int8, scales."""
    parts: list[Part] = ["payload", "scale"] if manifest.encoding.kind == "int8" else ["payload"]
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


def channel_folder(tap: str) -> str:
    """Return the folder of a tap's channel calibration, an array (T, C)."""
    return f"features/{tap}.channel"


def channel_file(tap: str) -> str:
    """Return the path of the one chunk of a tap's channel calibration."""
    return f"{channel_folder(tap)}/c/0/0"


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
        if manifest.encoding.kind == "int8":
            documents[f"{channel_folder(tap.name)}/zarr.json"] = _json(_channel_metadata(manifest, tap))
    return documents


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode("ascii")


def _sharded_metadata(manifest: Manifest, layout: ArrayLayout) -> dict[str, Any]:
    shape = [*layout.outer, *layout.inner]
    codecs = [_bytes_codec(layout.dtype)]
    if layout.compression == "zstd":
        codecs.append({"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}})
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


def _channel_metadata(manifest: Manifest, tap: TapInfo) -> dict[str, Any]:
    shape = [len(manifest.curriculum.timesteps), tap.channels]
    metadata = _array_metadata(shape, shape, "float32", ["timestep", "channel"])
    metadata["codecs"] = [_bytes_codec("float32")]
    metadata["attributes"] = {"part": "channel", "timesteps": manifest.curriculum.timesteps}
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
    return {"name": "bytes"} if dtype == "int8" else {"name": "bytes", "configuration": {"endian": "little"}}

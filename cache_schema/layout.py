"""Where everything in a cache lies, whatever its store: pure functions of the manifest.

What differs between the stores of features is behind `cache_schema.stores`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cache_schema.manifest import Manifest, TapInfo

SAMPLES_NAME = "samples.parquet"
CARD_NAME = "README.md"
IMAGE_INDEX_NAME = "images/index.npy"
FEATURES_FOLDER = "features"

Part = Literal["payload", "scale"]

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
    """An array of shape (N, V, T, *inner): one chunk per (sample, view, timestep), S samples per shard.

    `name` tells it from the other arrays of the cache: the tap, and for other parts than the payload the part.
    """

    name: str
    part: Part
    dtype: str
    outer: tuple[int, int, int]
    inner: tuple[int, ...]
    samples_per_shard: int
    compression: str

    @property
    def chunks_per_shard(self) -> tuple[int, int, int]:
        """The chunks in a shard: (samples, views, timesteps)."""
        return (self.samples_per_shard, self.outer[1], self.outer[2])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one sample's values: (V, T, *inner)."""
        return (*self.outer[1:], *self.inner)

    @property
    def row_bytes(self) -> int:
        """The bytes of one sample's values before compression."""
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class CalibrationLayout:
    """A float32 array of statistics of the features of one tap, measured before its first shard is written.

    `name` is the tap and the `part`, `dimensions` says what each axis of `shape` counts.
    """

    name: str
    part: str
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the values."""
        return 4 * math.prod(self.shape)


def feature_layouts(manifest: Manifest, tap: TapInfo) -> list[ArrayLayout]:
    """Return the layouts of everything that is stored per sample for one tap: payload and, where scaled, scales."""
    parts: list[Part] = ["payload", "scale"] if manifest.encoding.scaled else ["payload"]
    return [_layout(manifest, tap, part) for part in parts]


def all_layouts(manifest: Manifest) -> list[ArrayLayout]:
    """Return the layouts of everything that is stored per sample: for every tap, every part of it."""
    return [array for tap in manifest.taps for array in feature_layouts(manifest, tap)]


def channel_layout(manifest: Manifest, tap: TapInfo) -> CalibrationLayout:
    """Return the layout of a tap's channel calibration (T, C)."""
    shape = (len(manifest.curriculum.timesteps), tap.channels)
    return CalibrationLayout(f"{tap.name}.channel", "channel", shape, ("timestep", "channel"))


def calibration_layouts(manifest: Manifest, tap: TapInfo) -> list[CalibrationLayout]:
    """Return the layouts of the statistics that the encoding needs of one tap."""
    return [channel_layout(manifest, tap)] if manifest.encoding.scaled else []


def all_calibrations(manifest: Manifest) -> list[CalibrationLayout]:
    """Return the layouts of the statistics of every tap."""
    return [array for tap in manifest.taps for array in calibration_layouts(manifest, tap)]


def _layout(manifest: Manifest, tap: TapInfo, part: Part) -> ArrayLayout:
    payload = part == "payload"
    return ArrayLayout(
        name=tap.name if payload else f"{tap.name}.{part}",
        part=part,
        dtype=PAYLOAD_DTYPES[manifest.encoding.kind] if payload else "float32",
        outer=(manifest.dataset.feature_rows, len(manifest.views), len(manifest.curriculum.timesteps)),
        inner=(tap.tokens, tap.channels) if payload else (tap.tokens,),
        samples_per_shard=manifest.store.samples_per_shard,
        compression=manifest.encoding.compression,
    )


def image_file(shard: int) -> str:
    """Return the path of one shard of student images."""
    return f"images/{shard:05d}.tar"


def rows_of_shard(shard: int, per_shard: int, rows: int) -> range:
    """Return the rows of one shard; the last shard may be short."""
    return range(shard * per_shard, min((shard + 1) * per_shard, rows))

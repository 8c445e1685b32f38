"""Where everything in a cache lies, whatever its store: pure functions of the manifest.

What differs between the stores of features is behind `cache_schema.stores.base`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cache_schema.format.manifest import Compression, Manifest, TapInfo

SAMPLES_NAME = "samples.parquet"
CARD_NAME = "README.md"
IMAGE_INDEX_NAME = "images/index.npy"
FEATURES_FOLDER = "features"

ArrayPart = Literal["payload", "scale"]
# "channel": amplitudes that scaled number formats are relative to. "offset" and "factor": what is done to massive
# channels. The others are those of PCA.
CalibrationPart = Literal["offset", "factor", "amplitude", "mean", "basis", "channel"]

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
    part: ArrayPart
    dtype: str
    outer: tuple[int, int, int]
    inner: tuple[int, ...]
    samples_per_shard: int
    compression: Compression

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
    part: CalibrationPart
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the values."""
        return 4 * math.prod(self.shape)


def feature_layouts(manifest: Manifest, tap: TapInfo) -> list[ArrayLayout]:
    """Return the layouts of everything that is stored per sample for one tap: payload and, where scaled, scales."""
    parts: list[ArrayPart] = ["payload", "scale"] if manifest.encoding.scaled else ["payload"]
    return [_layout(manifest, tap, part) for part in parts]


def all_layouts(manifest: Manifest) -> list[ArrayLayout]:
    """Return the layouts of everything that is stored per sample: for every tap, every part of it."""
    return [array for tap in manifest.taps for array in feature_layouts(manifest, tap)]


def calibration_layouts(manifest: Manifest, tap: TapInfo) -> list[CalibrationLayout]:
    """Return the layouts of the statistics that the encoding of a tap rests on; none for encodings without.

    Of massive channels `offset` and `factor` (T, C_teacher); of PCA `amplitude` (C_teacher,), `mean` (C_teacher,) and
    `basis` (C, C_teacher); of scaled number formats `channel` (T, C).
    """
    arrays: list[tuple[CalibrationPart, tuple[int, ...], tuple[str, ...]]] = []
    timesteps = len(manifest.curriculum.timesteps)
    if manifest.encoding.massive != "keep":
        shape = (timesteps, tap.teacher_channels or tap.channels)
        arrays += [
            ("offset", shape, ("timestep", "teacher_channel")),
            ("factor", shape, ("timestep", "teacher_channel")),
        ]
    if manifest.encoding.pca is not None:
        assert tap.teacher_channels is not None
        arrays += [
            ("amplitude", (tap.teacher_channels,), ("teacher_channel",)),
            ("mean", (tap.teacher_channels,), ("teacher_channel",)),
            ("basis", (tap.channels, tap.teacher_channels), ("channel", "teacher_channel")),
        ]
    if manifest.encoding.scaled:
        arrays.append(("channel", (timesteps, tap.channels), ("timestep", "channel")))
    return [CalibrationLayout(f"{tap.name}.{part}", part, shape, names) for part, shape, names in arrays]


def all_calibrations(manifest: Manifest) -> list[CalibrationLayout]:
    """Return the layouts of the statistics of every tap."""
    return [array for tap in manifest.taps for array in calibration_layouts(manifest, tap)]


def _layout(manifest: Manifest, tap: TapInfo, part: ArrayPart) -> ArrayLayout:
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

"""How many bytes a cache will take, from shapes alone: arithmetic that tests hold against caches on disk."""

from collections.abc import Sequence
from dataclasses import dataclass

from cache_schema.errors import CacheError
from cache_schema.manifest import Encoding, EncodingKind, TapInfo
from cache_schema.plan import choose_samples_per_shard

VALUE_BYTES: dict[EncodingKind, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3": 1}
_SCALE_BYTES = 4
_INDEX_BYTES, _CHECKSUM_BYTES = 16, 4  # of a chunk and of a shard file, by the sharding codec
_TAR_BLOCK = 512


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a whole cache. features: payload and scales; overhead: shard indices and calibration; images: tars."""

    features: int
    overhead: int
    images: int

    @property
    def total(self) -> int:
        """Everything that grows with the data set."""
        return self.features + self.overhead + self.images


def stored_tap(tap: TapInfo, encoding: Encoding) -> TapInfo:
    """Return the shape in which a teacher's tap is stored, after pooling and PCA.

    Raises CacheError if the pool does not divide the grid or there are fewer channels than components.
    """
    rows, columns = tap.grid
    if rows % encoding.pool or columns % encoding.pool:
        raise CacheError(f"pool {encoding.pool} does not divide the {rows}x{columns} token grid of tap {tap.name}")
    if encoding.pca is not None and encoding.pca > tap.channels:
        raise CacheError(f"pca {encoding.pca} asks for more than the {tap.channels} channels of tap {tap.name}")
    grid = (rows // encoding.pool, columns // encoding.pool)
    return TapInfo(
        name=tap.name,
        tokens=grid[0] * grid[1],
        channels=encoding.pca or tap.channels,
        grid=grid,
        teacher_channels=None if encoding.pca is None else tap.channels,
    )


def chunk_bytes(tap: TapInfo, encoding: Encoding) -> int:
    """Return the bytes of one sample, view and timestep of a teacher's tap: values and, where there are any, scales."""
    stored = stored_tap(tap, encoding)
    scales = _SCALE_BYTES if encoding.scaled else 0
    return stored.tokens * (stored.channels * VALUE_BYTES[encoding.kind] + scales)


def estimate_size(
    taps: Sequence[TapInfo],
    encoding: Encoding,
    *,
    views: int,
    timesteps: int,
    rows: int,
    image_rows: int = 0,
    image_bytes: float = 0.0,
    samples_per_shard: int | None = None,
) -> CacheSize:
    """Return the bytes of a cache of `rows` samples before compression; taps as the teacher computes them.

    `image_rows` student images of `image_bytes` each on average. Raises CacheError as `stored_tap` does.
    """
    stored = [stored_tap(tap, encoding) for tap in taps]
    chunks = views * timesteps
    features = rows * chunks * sum(chunk_bytes(tap, encoding) for tap in taps)
    per_shard = samples_per_shard or choose_samples_per_shard(stored, encoding, views, timesteps)
    files = -(-rows // per_shard) * len(taps) * (2 if encoding.scaled else 1)
    overhead = files * (_INDEX_BYTES * per_shard * chunks + _CHECKSUM_BYTES)
    overhead += sum(
        _calibration_bytes(before, after, encoding, timesteps) for before, after in zip(taps, stored, strict=True)
    )
    # A tar pads its members to whole blocks, half a block on average, and gives each a header.
    return CacheSize(features, overhead, round(image_rows * (image_bytes + 1.5 * _TAR_BLOCK)) if image_bytes else 0)


def _calibration_bytes(before: TapInfo, after: TapInfo, encoding: Encoding, timesteps: int) -> int:
    amplitudes = 4 * timesteps * after.channels if encoding.scaled else 0
    # Amplitude, mean and components of the teacher's channels, one set for all timesteps.
    components = 0 if encoding.pca is None else 4 * before.channels * (after.channels + 2)
    return amplitudes + components

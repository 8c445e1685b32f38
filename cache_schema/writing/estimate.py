"""How many bytes a cache will take, from shapes alone: arithmetic that tests hold against caches on disk."""

from collections.abc import Sequence
from dataclasses import dataclass

from cache_schema.encoding.reduction import stored_tap
from cache_schema.format.manifest import Encoding, EncodingKind, StoreKind, TapInfo
from cache_schema.storage import tar
from cache_schema.writing.plan import choose_samples_per_shard

VALUE_BYTES: dict[EncodingKind, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3": 1}
_SCALE_BYTES = 4
_INDEX_BYTES, _CHECKSUM_BYTES = 16, 4  # of a chunk and of a shard file, by the sharding codec
_NPY_HEADER = 128
_JSON_MEMBER = 2 * tar.BLOCK


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a whole cache. features: values and scales; overhead: the store and calibration; images: tars."""

    features: int
    overhead: int
    images: int

    @property
    def total(self) -> int:
        """Everything that grows with the data set."""
        return self.features + self.overhead + self.images


def chunk_bytes(tap: TapInfo, encoding: Encoding) -> int:
    """Return the bytes of one sample, view and timestep of a teacher's tap: values and, where there are any, scales."""
    return sum(_part_bytes(stored_tap(tap, encoding), encoding))


def estimate_size(
    taps: Sequence[TapInfo],
    encoding: Encoding,
    *,
    views: int,
    timesteps: int,
    rows: int,
    image_rows: int = 0,
    image_bytes: float = 0.0,
    store: StoreKind = "zarr",
    samples_per_shard: int | None = None,
) -> CacheSize:
    """Return the bytes of a cache of `rows` samples before compression; taps as the teacher computes them.

    `image_rows` student images of `image_bytes` each on average. Raises InvalidEncoding as
    `cache_schema.encoding.reduction.stored_tap` does.
    """
    stored = [stored_tap(tap, encoding) for tap in taps]
    chunks = views * timesteps
    arrays = [chunks * size for tap in stored for size in _part_bytes(tap, encoding)]  # bytes of a sample
    per_shard = samples_per_shard or choose_samples_per_shard(stored, encoding, views, timesteps)
    statistics = [
        size for pair in zip(taps, stored, strict=True) for size in _statistic_bytes(*pair, encoding, timesteps)
    ]
    if store == "zarr":
        index = _INDEX_BYTES * per_shard * chunks + _CHECKSUM_BYTES
        overhead = sum(statistics) + -(-rows // per_shard) * len(arrays) * index
    else:
        sample = sum(tar.BLOCK + tar.padded(_NPY_HEADER + size) for size in arrays) + _JSON_MEMBER
        whole, rest = divmod(rows, per_shard)
        archives = whole * tar.archive_size(per_shard * sample) + (tar.archive_size(rest * sample) if rest else 0)
        overhead = sum(_NPY_HEADER + size for size in statistics) + archives - rows * sum(arrays)
    # A tar gives its members headers and pads them to whole blocks: half a block on average.
    images = round(image_rows * (image_bytes + 1.5 * tar.BLOCK)) if image_bytes else 0
    return CacheSize(rows * sum(arrays), overhead, images)


def _part_bytes(stored: TapInfo, encoding: Encoding) -> list[int]:
    """The bytes of one sample, view and timestep in each array of a stored tap: values and, where scaled, scales."""
    values = stored.tokens * stored.channels * VALUE_BYTES[encoding.kind]
    return [values, stored.tokens * _SCALE_BYTES] if encoding.scaled else [values]


def _statistic_bytes(before: TapInfo, after: TapInfo, encoding: Encoding, timesteps: int) -> list[int]:
    """The bytes of every array of statistics of a tap, as the teacher computes it and as it is stored."""
    # Amplitude, mean and components of the teacher's channels are one set for all timesteps.
    components = [] if encoding.pca is None else [4 * before.channels * n for n in (1, 1, after.channels)]
    treatment = [] if encoding.massive == "keep" else 2 * [4 * timesteps * before.channels]
    return [*treatment, *components, *([4 * timesteps * after.channels] if encoding.scaled else [])]

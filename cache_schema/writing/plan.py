"""From what a cache shall hold to the manifest that says so: sizes of shards, counts of files, the cache id."""

import math

import numpy as np

from cache_schema.encoding.reduction import stored_tap
from cache_schema.format.layout import PAYLOAD_DTYPES
from cache_schema.format.manifest import (
    CropsInfo,
    Curriculum,
    DatasetInfo,
    Encoding,
    ImagesInfo,
    Manifest,
    Provenance,
    StoreInfo,
    StoreKind,
    TapInfo,
    TeacherInfo,
)
from cache_schema.stores.webdataset_store import check_member_sizes

DEFAULT_SHARD_BYTES = 64_000_000
# Small features would otherwise put a whole data set into one shard, and an interruption would lose all of it.
MAX_SAMPLES_PER_SHARD = 512
DEFAULT_IMAGES_PER_SHARD = 1024


def row_bytes(tap: TapInfo, encoding: Encoding, views: int, timesteps: int) -> int:
    """Return the bytes one sample takes in the payload of one tap as it is stored, before compression."""
    itemsize = np.dtype(PAYLOAD_DTYPES[encoding.kind]).itemsize
    return views * timesteps * tap.tokens * tap.channels * itemsize


def choose_samples_per_shard(
    taps: list[TapInfo],
    encoding: Encoding,
    views: int,
    timesteps: int,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    batch: int = 1,
) -> int:
    """Return how many samples make the largest stored tap's shard files about `shard_bytes` long (1 to 512).

    They are whole batches of `batch` samples, where one fits: batches begin at a shard's first row, so that the last
    one would otherwise be nearly empty.
    """
    largest = max(row_bytes(tap, encoding, views, timesteps) for tap in taps)
    samples = min(MAX_SAMPLES_PER_SHARD, max(1, round(shard_bytes / largest)))
    return max(samples - samples % batch, min(samples, batch))


def plan_manifest(
    *,
    dataset: DatasetInfo,
    teacher: TeacherInfo,
    curriculum: Curriculum,
    taps: list[TapInfo],
    encoding: Encoding,
    views: list[str],
    images: ImagesInfo | None,
    image_rows: int,
    samples_per_shard: int | None = None,
    images_per_shard: int | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    batch: int = 1,
    provenance: Provenance | None = None,
    store: StoreKind = "zarr",
    crops: CropsInfo | None = None,
) -> Manifest:
    """Return the unsealed manifest of a cache, with its id and the sizes of its shards.

    `taps` have the shapes in which the teacher computes them; those in which they are stored follow from `encoding`.
    Shards whose size is not given hold whole batches of `batch` samples. `image_rows` is the number of samples that are
    not quarantined; it is ignored where `images` is None. Both stores group samples in the same way, so that one can be
    converted into the other shard by shard. Raises InvalidEncoding if a tap cannot be pooled or has too few channels
    for PCA, pydantic.ValidationError if the parts contradict each other, CacheError for samples too large for the
    store.
    """
    stored = [stored_tap(tap, encoding) for tap in taps]
    per_shard = samples_per_shard or choose_samples_per_shard(
        stored, encoding, len(views), len(curriculum.timesteps), shard_bytes, batch
    )
    images_each = images_per_shard or DEFAULT_IMAGES_PER_SHARD
    manifest = Manifest(
        dataset=dataset,
        teacher=teacher,
        curriculum=curriculum,
        taps=stored,
        encoding=encoding,
        views=views,
        crops=crops,
        images=images,
        store=StoreInfo(
            kind=store,
            samples_per_shard=per_shard,
            feature_shards=math.ceil(dataset.feature_rows / per_shard),
            images_per_shard=images_each,
            image_shards=0 if images is None else math.ceil(image_rows / images_each),
        ),
        provenance=provenance or Provenance(),
    )
    if store == "webdataset":
        check_member_sizes(manifest)
    return manifest

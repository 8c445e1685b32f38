"""Synthetic caches for measurements: random features, the same on every machine, in the shapes of a real teacher."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache_schema import (
    CacheWriter,
    Curriculum,
    DatasetInfo,
    Encoding,
    Manifest,
    TapInfo,
    TeacherInfo,
    create_cache,
    open_cache,
)
from cache_schema.encoding.number_formats import Array
from cache_schema.format.layout import PAYLOAD_DTYPES, feature_layouts
from cache_schema.format.samples import fingerprint_samples, samples_table
from cache_schema.storage.local import LocalFolder
from cache_schema.stores.calibration_files import load_codec
from cache_schema.stores.registry import store_of
from cache_schema.writing.plan import plan_manifest

TAP = "hidden"
CALIBRATION_ROWS = 4


@dataclass(frozen=True)
class Workload:
    """One sample is (T, L, C) values of one tap in one encoding."""

    kind: str
    tokens: int
    channels: int
    timesteps: tuple[int, ...] = (10, 16, 22, 28)

    @property
    def shape(self) -> tuple[int, int, int]:
        """A sample's shape (T, L, C)."""
        return (len(self.timesteps), self.tokens, self.channels)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of the stored values; bfloat16 is stored as its bits, uint16."""
        return np.dtype(PAYLOAD_DTYPES[self.kind])

    @property
    def sample_bytes(self) -> int:
        """The bytes of one encoded sample, without its scales."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __str__(self) -> str:
        shape = ", ".join(str(size) for size in self.shape)
        return f"({shape}) {self.kind}, {self.sample_bytes / 1e6:.2f} MB a sample"


# What pooled FLUX features with PCA to 768 channels take, and full-width hidden states.
INT8 = Workload("int8", tokens=256, channels=768)
BFLOAT16 = Workload("bfloat16", tokens=256, channels=3072)


def features(workload: Workload, rows: Iterable[int]) -> Array:
    """Return float32 features (rows, 1, T, L, C), a pure function of the row numbers."""
    stack = [np.random.default_rng([7, row]).standard_normal((1, *workload.shape), dtype=np.float32) for row in rows]
    return np.array(stack).reshape(-1, 1, *workload.shape)


def plan(workload: Workload, samples: int, **changes: Any) -> tuple[Manifest, pa.Table]:
    """Return the manifest and the samples table of a cache of random features; `changes` replace parts of the plan."""
    table = samples_table(
        {
            "id": f"{i:06d}",
            "split": "train",
            "label": i % 7,
            "source": f"{i}.jpg",
            "sha256": f"{i:064x}",
            "width": 8,
            "height": 8,
        }
        for i in range(samples)
    )
    sigmas = np.linspace(0.9, 0.1, len(workload.timesteps)).round(6).tolist()
    parts: dict[str, Any] = {
        "dataset": DatasetInfo(
            name="random",
            protocol="none",
            fingerprint=fingerprint_samples(table),
            superclass="thing",
            counts={"train": samples},
            feature_splits=["train"],
            feature_rows=samples,
        ),
        "teacher": TeacherInfo(
            family="none",
            source="random",
            pipeline_class="none",
            digests={},
            dtype="float32",
            resolution=256,
            text="none",
        ),
        "curriculum": Curriculum(num_steps=28, timesteps=list(workload.timesteps), sigmas=sigmas, seed=0),
        "taps": [TapInfo(name=TAP, tokens=workload.tokens, channels=workload.channels, grid=(1, workload.tokens))],
        "encoding": Encoding(kind=workload.kind),
        "views": ["canonical"],
        "images": None,
        "image_rows": samples,
    }
    return plan_manifest(**{**parts, **changes}), table


def begin_cache(folder: Path, workload: Workload, samples: int, **changes: Any) -> CacheWriter:
    """Create an empty cache, calibrated where its encoding wants that."""
    manifest, table = plan(workload, samples, **changes)
    writer = create_cache(folder, manifest, table)
    if writer.needs_calibration():
        writer.calibrate({TAP: features(workload, range(min(samples, CALIBRATION_ROWS)))})
    return writer


def write_cache(folder: Path, workload: Workload, samples: int, **changes: Any) -> Path:
    """Write and seal a cache of random features; return its folder."""
    writer = begin_cache(folder, workload, samples, **changes)
    for shard in writer.missing_shards():
        writer.write_shard(shard, {TAP: features(workload, writer.shard_rows(shard))})
    writer.seal()
    return folder


def encoded_features(folder: Path, workload: Workload, row: int) -> Array:
    """Return what the payload of a row must be, (T, L, C), computed from its features and not read from the store."""
    manifest = open_cache(folder).manifest
    codec = load_codec(LocalFolder(folder), manifest, manifest.taps[0])
    return codec.encode(features(workload, [row])[0]).payload[0]


def mapped_payloads(folder: Path, workload: Workload) -> list[Array]:
    """Return one read-only memory map (T, L, C) per row of an uncompressed Zarr cache with one view."""
    manifest = open_cache(folder).manifest
    layout = next(array for array in feature_layouts(manifest, manifest.taps[0]) if array.part == "payload")
    rows: list[Array] = []
    for shard in range(manifest.store.feature_shards):
        count = min(layout.samples_per_shard, manifest.dataset.feature_rows - len(rows))
        shape = (count, *workload.shape)
        path = folder / store_of(manifest).array_file(layout, shard)
        rows.extend(np.memmap(path, dtype=workload.dtype, mode="r", shape=shape))
    return rows

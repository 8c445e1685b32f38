"""A cache as the objects of other libraries: a `zarr.Array` of what is stored, a `webdataset` pipeline of samples.

The libraries read the files themselves: they neither know the journal nor check what they read against its checksums.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from cache_schema.encoding.number_formats import Array
from cache_schema.errors import CacheCorrupt, CacheRequestError
from cache_schema.format import layout
from cache_schema.format.damage import damaged
from cache_schema.format.layout import ArrayLayout
from cache_schema.format.manifest import Manifest
from cache_schema.storage.folder import Folder
from cache_schema.storage.local import LocalFolder
from cache_schema.stores.images import EXTENSIONS
from cache_schema.stores.registry import store_of
from cache_schema.stores.webdataset_store import npy_header

if TYPE_CHECKING:
    import webdataset
    import zarr


class Samples(Protocol):
    """What a pipeline asks an open cache for; `cache_schema.Cache` is one, and can be sent to worker processes."""

    folder: Folder
    manifest: Manifest

    @property
    def root(self) -> Path:
        """The directory of the cache."""

    @property
    def samples(self) -> pa.Table:
        """The samples table."""

    @property
    def feature_rows(self) -> Sequence[int]:
        """The rows that have features, ascending."""

    def decode(
        self, payload: Array, scale: Array | None = None, tap: str = "hidden", timesteps: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return the features that stored values stand for."""

    def images(self, rows: Sequence[int]) -> list[bytes]:
        """Return encoded images."""


def zarr_array(root: Path, manifest: Manifest, tap: str, part: str) -> zarr.Array:
    """Open one array of the Zarr store of a cache, read-only; raises CacheRequestError, CacheCorrupt."""
    import zarr

    folder = LocalFolder(root)

    if manifest.store.kind != "zarr":
        raise CacheRequestError(
            f"cache {manifest.label} has no Zarr arrays, its store is {manifest.store.kind}: convert it to the zarr "
            "store, or take its samples from Cache.webdataset"
        )
    name = tap if part == "payload" else f"{tap}.{part}"
    info = manifest.tap(tap)
    assert info is not None
    parts: list[str] = [array.part for array in layout.feature_layouts(manifest, info)]
    parts += [array.part for array in layout.calibration_layouts(manifest, info)]
    if part not in parts:
        raise CacheRequestError(f"tap {tap} of cache {manifest.label} has no part {part} (has {', '.join(parts)})")
    # Zarr would follow whatever this file says, be it another codec or an array of petabytes.
    document = f"{layout.FEATURES_FOLDER}/{name}/zarr.json"
    expected = store_of(manifest).documents()[document]
    if folder.read_bounded(document, len(expected)) != expected:
        raise damaged(folder, f"{folder.where(document)} is not the metadata that the manifest implies")
    array = zarr.open_array(folder.where(f"{layout.FEATURES_FOLDER}/{name}"), mode="r")
    assert isinstance(array, zarr.Array)
    return array


@dataclass(frozen=True)
class SampleDecoder:
    """Turns a sample of one of the cache's tars, member to bytes, into what `sample_pipeline` yields."""

    cache: Samples
    taps: Sequence[str]
    timesteps: Sequence[int] | None
    views: Sequence[int]
    image_key: str | None

    def has_features(self, sample: dict[str, Any]) -> bool:
        """Say whether the teacher did not fail on a sample."""
        return "failed" not in self._description(sample)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return key, row, id, label, split and image of a sample, and its features (V, T, L, C) by tap."""
        row = self._description(sample)["row"]
        rows = self.cache.samples
        found: dict[str, Any] = {name: value for name, value in sample.items() if name.startswith("__")}
        found |= {"row": row, **{name: rows[name][row].as_py() for name in ("id", "label", "split")}}
        if self.image_key is not None:
            (found[self.image_key],) = self.cache.images([row])
        for tap in self.taps:
            found[tap] = self._features(sample, tap)
        return found

    def _features(self, sample: dict[str, Any], tap: str) -> torch.Tensor:
        manifest = self.cache.manifest
        info = manifest.tap(tap)
        assert info is not None
        have = manifest.curriculum.timesteps
        steps = [have.index(step) for step in (have if self.timesteps is None else self.timesteps)]
        # By the layout, not its name: the scale of `single.3` is a member of its own.
        parts = {
            array.part: self._member(sample, array)[list(self.views)][:, steps]
            for array in layout.feature_layouts(manifest, info)
        }
        return self.cache.decode(parts["payload"], parts.get("scale"), tap, self.timesteps)

    def _member(self, sample: dict[str, Any], array: ArrayLayout) -> Array:
        """Return the values (V, T, *inner) of one array; nothing in the member's header is interpreted."""
        data, header = sample.get(f"{array.name}.npy", b""), npy_header(array.dtype, array.row_shape)
        if len(data) != len(header) + array.row_bytes or not data.startswith(header):
            raise self._damage(sample, f"has no {array.row_shape} {array.dtype} values of {array.name}")
        return np.frombuffer(data, np.dtype(array.dtype).newbyteorder("<"), offset=len(header)).reshape(array.row_shape)

    def _description(self, sample: dict[str, Any]) -> dict[str, Any]:
        try:
            description = json.loads(sample["json"])
            row = description["row"]
        except (ValueError, RecursionError, KeyError, TypeError):
            row = None
        if type(row) is not int or not 0 <= row < self.cache.manifest.dataset.feature_rows:
            raise self._damage(sample, "does not say which row it is")
        return description

    def _damage(self, sample: dict[str, Any], reason: str) -> CacheCorrupt:
        return damaged(self.cache.folder, f"sample {sample['__key__']} of {sample['__url__']} {reason}")


def sample_pipeline(
    cache: Samples,
    taps: Sequence[str],
    timesteps: Sequence[int] | None,
    views: Sequence[int],
    images: bool,
    options: dict[str, Any],
) -> webdataset.WebDataset:
    """Return the samples of a cache's tars, decoded, as a pipeline; raises CacheRequestError."""
    manifest, root = cache.manifest, cache.root.absolute()
    if manifest.store.kind != "webdataset":
        raise CacheRequestError(
            f"cache {manifest.label} has no tars of features, its store is {manifest.store.kind}: convert it to the "
            "webdataset store, or use Cache.zarr"
        )
    try:
        import webdataset
    except ModuleNotFoundError as error:
        if error.name != "webdataset":
            raise
        raise CacheRequestError("webdataset is not installed; pip install 'dit-distill[webdataset]'") from error
    if set("?#") & set(str(root)):
        raise CacheRequestError(
            f"webdataset takes {root} for a URL with a query; move the cache to a path without ? and #"
        )
    store = store_of(manifest)
    (array, *_) = layout.all_layouts(manifest)
    shards = sorted({row // manifest.store.samples_per_shard for row in cache.feature_rows})
    urls = [str(root / store.array_file(array, shard)) for shard in shards]
    image_key = None if manifest.images is None or not images else EXTENSIONS[manifest.images.format]
    decoder = SampleDecoder(cache, tuple(taps), timesteps, tuple(views), image_key)
    pipeline = webdataset.WebDataset(urls, **{"shardshuffle": False, **options})
    return pipeline.select(decoder.has_features).map(decoder)

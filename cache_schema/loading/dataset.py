"""A cache as a PyTorch dataset, whose batches cross from worker processes without being copied."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from cache_schema.errors import CacheRequestError, LoaderError
from cache_schema.loading.sampler import Rows
from cache_schema.loading.slots import Layout, Lease, OwnsRing, SlotRing, allocate
from cache_schema.reading.batch import EncodedBatch
from cache_schema.reading.reader import Cache

View = int | str
SLOTS = 64


@dataclass(frozen=True, kw_only=True)
class FeatureBatch(EncodedBatch):
    """Encoded features that say what they are of: `rows` (B,) of the cache, and `views` (B,), both int64 on the CPU."""

    rows: torch.Tensor
    views: torch.Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> EncodedBatch:
        """Return the batch, still encoded, on another device; its own memory is not used again before that is done."""
        moved = super().to(device, non_blocking=non_blocking)
        if (place := self.__dict__.get("_place")) is not None:
            dataset, lease = place
            dataset._ring.copied(lease, moved.payload.device)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_place"}


class CacheDataset(OwnsRing, Dataset[FeatureBatch]):
    """The features of a cache as a map-style dataset: sample i is that of `rows[i]`, all rows with features by default.

    ```python
    dataset = CacheDataset(cache, tap="hidden", batch_size=32)
    loader = DataLoader(dataset, batch_size=32, shuffle=True, num_workers=2, collate_fn=dataset.collate)
    ```

    A batch is read with one request. With `batch_size`, batches of up to that many samples are read into memory that
    is used again as soon as nothing refers to the batch, here and in worker processes: several times faster than fresh
    memory for each. Up to `slots` such batches exist at once, further ones are read into fresh memory. The dataset may
    be forked and pickled. `FeatureLoader` adds an order that can be resumed, and errors in one line.

    With `each`, a batch has so many timesteps of each sample, which `read` is told; no others are read.
    """

    def __init__(
        self,
        cache: Cache,
        tap: str = "hidden",
        timesteps: Sequence[int] | None = None,
        view: View = 0,
        rows: Sequence[int] | Rows | None = None,
        *,
        batch_size: int | None = None,
        slots: int = SLOTS,
        each: int | None = None,
    ) -> None:
        self.cache, self.tap = cache, tap
        self.timesteps = timesteps if each is None else np.empty((0, each), dtype=np.int64)
        self.rows, self.view = select_rows(cache, rows), view_numbers(cache, [view])[0]
        self._empty = cache.read([], tap=tap, timesteps=self.timesteps)  # what of a batch does not depend on its rows
        self.batch_size, self._slots = batch_size, slots
        self._make_ring()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> FeatureBatch:
        """Return one sample, as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> FeatureBatch:
        """Return the samples at `indices` as one batch."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        return self.read(rows, np.full(len(rows), self.view))

    def read(self, rows: Rows, views: Rows, timesteps: Rows | None = None) -> FeatureBatch:
        """Return the features of any rows of the cache, each in its own view (both (B,)).

        `timesteps` (B, each): those of each row, where the dataset is made to be told.
        """
        lease = self._ring.take() if self._ring is not None and len(rows) <= (self.batch_size or 0) else None
        if self._ring is None or lease is None:
            parts = allocate(self._layout(len(rows)), len(rows))
        else:
            parts = self._ring.tensors(lease, len(rows))
        steps = self.timesteps if timesteps is None else timesteps
        encoded = self.cache.read(rows, tap=self.tap, timesteps=steps, view=views, out=parts["payload"])
        for name, part in (("scale", encoded.scale), ("channel", encoded.channel)):
            if part is not None and name in parts:
                # By NumPy: in a thread, torch would bring a second team of OpenMP threads to the cores that train.
                np.copyto(parts[name].numpy(), part.numpy())
        return self._batch(parts, rows, views, lease)

    @staticmethod
    def collate(samples: FeatureBatch | Sequence[FeatureBatch]) -> FeatureBatch:
        """Join samples to a batch; what comes from `__getitems__` is one already."""
        if isinstance(samples, FeatureBatch):
            return samples
        scales = [sample.scale for sample in samples if sample.scale is not None]
        # One calibration is that of all samples, unless each brings that of its own timesteps.
        own = [sample.channel for sample in samples if sample.channel is not None and sample.channel.dim() == 3]
        return replace(
            samples[0],
            payload=torch.cat([sample.payload for sample in samples]),
            scale=torch.cat(scales) if scales else None,
            channel=torch.cat(own) if own else samples[0].channel,
            rows=torch.cat([sample.rows for sample in samples]),
            views=torch.cat([sample.views for sample in samples]),
        )

    def pin_memory(self) -> None:
        """Page-lock the reused memory for this process's copies to a CUDA device; raises LoaderError."""
        if self._ring is not None:
            self._ring.pin()
            channel = self._empty.channel
            if channel is not None and channel.dim() == 2:  # not in the slots
                # Else this one small copy would wait on the host for the large ones queued before it.
                self._empty = replace(self._empty, channel=channel.pin_memory())

    def reclaim(self) -> None:
        """Reuse the page-locked memory of batches whose copies to the device are done."""
        if self._ring is not None:
            self._ring.reclaim()

    def _make_ring(self) -> None:
        self._ring = SlotRing(self._layout(self.batch_size), self._slots) if self.batch_size else None
        self._token = uuid.uuid4().hex
        _datasets[self._token] = self

    def _layout(self, rows: int) -> Layout:
        empty = self._empty
        # Of timesteps that each sample has for itself, the calibration travels with the batch.
        own = empty.channel if empty.channel is not None and empty.channel.dim() == 3 else None
        parts = {"payload": empty.payload, "scale": empty.scale, "channel": own}
        return {name: ((rows, *part.shape[1:]), part.dtype) for name, part in parts.items() if part is not None}

    def _batch(self, parts: dict[str, torch.Tensor], rows: Rows, views: Rows, lease: Lease | None) -> FeatureBatch:
        given = {field.name: getattr(self._empty, field.name) for field in fields(EncodedBatch)}
        given |= {"payload": parts["payload"], "scale": parts.get("scale")}
        given["channel"] = parts.get("channel", given["channel"])
        batch = FeatureBatch(**given, rows=torch.tensor(rows), views=torch.tensor(views))
        if lease is not None:
            # Not a field: a batch made from this one, by `to` or `replace`, has its own memory.
            object.__setattr__(batch, "_place", (self, lease))
        return batch


def select_rows(cache: Cache, rows: Sequence[int] | Rows | None) -> Rows:
    """Return the rows as an array, all with features by default; raises CacheRequestError for one without."""
    if rows is None:
        return np.asarray(cache.feature_rows, dtype=np.int64)
    chosen = np.asarray(rows)
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
        raise CacheRequestError("rows must be a sequence of row numbers")
    lacking = [row for row in chosen.tolist() if not cache.has_features(row)]
    if lacking:
        raise CacheRequestError(f"row {lacking[0]} of cache {cache.manifest.label} has no features")
    return chosen.astype(np.int64)


def view_numbers(cache: Cache, views: Sequence[View]) -> list[int]:
    """Return the numbers of views given by name or number; raises CacheRequestError for one the cache lacks."""
    names = cache.manifest.views
    numbers = [names.index(view) if view in names else view for view in views]
    lacking = [view for view in numbers if isinstance(view, str) or not 0 <= view < len(names)]
    if lacking:
        raise CacheRequestError(f"cache {cache.manifest.label} lacks view {lacking[0]} (has {', '.join(names)})")
    return [int(view) for view in numbers]


_datasets: weakref.WeakValueDictionary[str, CacheDataset] = weakref.WeakValueDictionary()


def _reduce_batch(batch: FeatureBatch) -> Any:
    """What a worker process sends to its parent: the slot, not its bytes, where that is possible."""
    place = batch.__dict__.get("_place")
    if place is not None:
        dataset, lease = place
        if dataset._ring.send(lease):
            return _receive_batch, (dataset._token, lease, batch.rows.numpy(), batch.views.numpy())
    return object.__reduce_ex__(batch, 2)


def _receive_batch(token: str, sent: Lease, rows: Rows, views: Rows) -> FeatureBatch:
    dataset = _datasets.get(token)
    if dataset is None or dataset._ring is None:
        raise LoaderError("a batch arrived after its dataset was gone; keep the dataset for as long as its workers")
    lease = dataset._ring.receive(sent)
    return dataset._batch(dataset._ring.tensors(lease, len(rows), received=True), rows, views, lease)


# Between processes alone: `copy` and plain pickling make copies.
ForkingPickler.register(FeatureBatch, _reduce_batch)

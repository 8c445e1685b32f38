"""Feeding a training loop from a cache: `FeatureLoader`.

Its worker processes are `ReadAhead`'s and not a DataLoader's, whichever is faster (benchmarks/README.md): when one of
those dies, a signal handler raises a bare RuntimeError wherever the main thread is, be it amid an optimizer step, where
no loader can turn it into a LoaderError. A scheduler's SIGTERM to all processes of a job kills those as well, while the
training process still has to finish its step and write a checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from cache_schema.errors import CacheRequestError
from cache_schema.loading.dataset import CacheDataset, FeatureBatch, View, view_numbers
from cache_schema.loading.sampler import VIEWS, EpochSampler, Rows, generator
from cache_schema.loading.side_by_side import AT_ONCE, reading_ahead
from cache_schema.read_ahead import PREFETCH
from cache_schema.reading.reader import Cache


class FeatureLoader:
    """Batches of encoded features in a reproducible order, epoch after epoch.

    ```python
    with FeatureLoader(cache, batch_size=32, tap="hidden", seed=0, workers=2) as loader:
        for epoch in range(30):
            for batch in loader:                       # FeatureBatch: payload (B, T, L, C), scale, rows, views
                tokens = batch.decode(device="cuda")   # encoded bytes cross the bus
    ```

    The order depends on `seed`, the rows and the batch size alone, not on the number of workers; `seed=None` keeps the
    rows in the order given. Of several views one is drawn for each sample. Iterating goes on after the last batch
    taken, to the end of that epoch: `state_dict()` says where that is, and a loader with the same arguments and any
    number of workers goes on from there after `load_state_dict()`.

    `workers` processes read two batches each ahead, into shared memory that is used again as soon as nothing refers
    to a batch. Without workers, threads of this process read four batches at once, but only while reading has to wait
    for a network or a disk. A batch stays as it is for as long as it is kept; but let go of it after `decode` or `to`,
    for once all slots (two for each worker or one for each thread, and four) are kept, further batches are read into
    fresh memory, which is slower.
    `pin_memory` page-locks the slots where there is CUDA, so that `batch.to(device, non_blocking=True)` overlaps, on
    any stream of any device: the slot is not used again before that copy is done. If you copy a batch's tensors by
    other means, let go of it while the stream that does is the current one. `start_method` is multiprocessing's,
    by default "spawn" for a cache that is elsewhere.

    A Ctrl-C in the moment in which Python lets go of a batch is reported and then lost, as CPython drops exceptions
    there; a script that must stop at the first one notes it in a signal handler and raises between batches.

    Raises CacheRequestError for what the cache does not hold; while iterating, what `Cache.read` raises, and
    LoaderError if a worker dies.
    """

    def __init__(
        self,
        cache: Cache,
        batch_size: int,
        tap: str = "hidden",
        timesteps: Sequence[int] | None = None,
        view: View | Sequence[View] = 0,
        rows: Sequence[int] | Rows | None = None,
        *,
        seed: int | None = 0,
        drop_last: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
        start_method: str | None = None,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise CacheRequestError(f"a loader needs batch_size ≥ 1 and workers ≥ 0, not {batch_size} and {workers}")
        views = view_numbers(cache, [view] if isinstance(view, int | str) else view)
        if not views or (seed is None and len(views) > 1):
            raise CacheRequestError("a loader needs a view; and a seed to draw from several")
        slots = (PREFETCH * workers if workers else AT_ONCE) + 4
        dataset = CacheDataset(cache, tap, timesteps, views[0], rows, batch_size=batch_size, slots=slots)
        if not len(dataset):
            raise CacheRequestError(f"there are no rows of cache {cache.manifest.label} to load")
        if pin_memory and torch.cuda.is_available():
            dataset.pin_memory()
        self.sampler = EpochSampler(dataset.rows, batch_size, seed, drop_last=drop_last)
        self._dataset = dataset
        batches = _Batches(dataset, self.sampler, views)
        # What is in memory here is read when it is asked for: one thread is the fastest then.
        self._ahead = reading_ahead(batches, [cache], workers=workers, calm=0, start_method=start_method)
        self._stream: Iterator[FeatureBatch] | None = None  # from batch `_taken` on
        self._order = {
            "cache_id": cache.manifest.cache_id,
            "rows": hashlib.sha256(dataset.rows.astype("<i8").tobytes()).hexdigest(),
            "batch_size": batch_size,
            "drop_last": drop_last,
            "seed": seed,
            "views": [cache.manifest.views[number] for number in views],
        }
        self._taken = 0  # batches, over all epochs

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return self.sampler.batches_per_epoch

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Yield the batches from the one after the last taken to the end of its epoch."""
        epoch = self._taken // len(self)
        while self._taken // len(self) == epoch:
            yield self._take()

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is, as JSON-ready values: batches that were taken count, those read ahead do not."""
        epoch, batch = divmod(self._taken, len(self))
        return {"epoch": epoch, "batch": batch, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; raises CacheRequestError if it is of a loader with another order of batches."""
        for name, mine in self._order.items():
            theirs = state["order"].get(name)
            if theirs != mine:
                raise CacheRequestError(
                    f"the saved state is of a loader with {name} {theirs}, this one has {mine}; make it with the same"
                )
        self._taken = state["epoch"] * len(self) + state["batch"]
        self._stream = None

    def close(self) -> None:
        """End the workers; batches that were taken stay valid."""
        self._stream = None
        self._ahead.close()

    def __enter__(self) -> FeatureLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _take(self) -> FeatureBatch:
        self._dataset.reclaim()
        if self._stream is None:
            self._stream = self._ahead.over(itertools.count(self._taken))
        try:
            batch = next(self._stream)
        except BaseException:
            self._stream = None  # the next one begins with this batch again
            raise
        self._taken += 1
        return batch


@dataclass(frozen=True)
class _Batches:
    """The batch of each update, a pure function that worker processes can be given."""

    dataset: CacheDataset
    sampler: EpochSampler
    views: list[int]

    def __call__(self, update: int) -> FeatureBatch:
        rows, seed = self.sampler.batch(update), self.sampler.seed
        if seed is None or len(self.views) == 1:
            return self.dataset.read(rows, np.full(len(rows), self.views[0]))
        drawn = generator(seed, VIEWS, update).integers(len(self.views), size=len(rows))
        return self.dataset.read(rows, np.array(self.views)[drawn])

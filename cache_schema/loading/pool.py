"""Memory that is used again for what belongs to a batch and is not of a cache: its images, say."""

from __future__ import annotations

import uuid
import weakref
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from cache_schema.errors import LoaderError
from cache_schema.loading.slots import Layout, Lease, OwnsRing, SlotRing, allocate


@dataclass(frozen=True)
class PooledTensors:
    """Tensors by name. Their memory is used again when nothing refers to any of them, here or where they were sent."""

    tensors: dict[str, torch.Tensor]
    _place: tuple[TensorPool, Lease] | None = None

    def copied(self, device: torch.device) -> None:
        """Say that they are being copied to `device`, on the stream that is current there."""
        if self._place is not None:
            pool, lease = self._place
            pool._ring.copied(lease, device)

    def __reduce__(self) -> tuple[Any, ...]:
        return PooledTensors, (self.tensors,)


class TensorPool(OwnsRing):
    """Tensors of one layout, whose first axis is the batch: in one of `slots` shared ones, or else in fresh memory.

    A worker process that was forked, or was given the pool when it started, sends its parent a slot's number and not
    the bytes.
    """

    def __init__(self, layout: Layout, slots: int) -> None:
        self._layout, self._slots = dict(layout), slots
        self._rows = min(shape[0] for shape, _ in layout.values())
        self._make_ring()

    def take(self, rows: int) -> PooledTensors:
        """Return tensors of so many rows, to be filled; what is in them is of no meaning."""
        lease = self._ring.take() if rows <= self._rows else None
        if lease is None:
            return PooledTensors(allocate(self._layout, rows))
        return PooledTensors(self._ring.tensors(lease, rows), (self, lease))

    def pin_memory(self) -> None:
        """Page-lock the slots for this process's copies to a CUDA device; raises LoaderError."""
        self._ring.pin()

    def reclaim(self) -> None:
        """Reuse the page-locked slots whose copies to the device are done."""
        self._ring.reclaim()

    def _make_ring(self) -> None:
        self._ring = SlotRing(self._layout, self._slots)
        self._token = uuid.uuid4().hex
        _pools[self._token] = self


_pools: weakref.WeakValueDictionary[str, TensorPool] = weakref.WeakValueDictionary()


def _reduce(pooled: PooledTensors) -> Any:
    """What a worker process sends to its parent: the slot, not its bytes, where that is possible."""
    if pooled._place is not None:
        pool, lease = pooled._place
        if pool._ring.send(lease):
            return _receive, (pool._token, lease, len(next(iter(pooled.tensors.values()))))
    return pooled.__reduce__()


def _receive(token: str, sent: Lease, rows: int) -> PooledTensors:
    pool = _pools.get(token)
    if pool is None:
        raise LoaderError("tensors arrived after their pool was gone; keep the pool for as long as its workers")
    lease = pool._ring.receive(sent)
    return PooledTensors(pool._ring.tensors(lease, rows, received=True), (pool, lease))


# Between processes alone: `copy` and plain pickling make copies.
ForkingPickler.register(PooledTensors, _reduce)

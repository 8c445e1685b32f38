"""Memory that batches are read into again and again, passed between processes without a copy."""

from __future__ import annotations

import fcntl
import itertools
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import parent_process, reduction
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch

from cache_schema.errors import LoaderError
from cache_schema.loading.queued_copies import QueuedCopies

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # name: shape and type of a tensor in a slot
_ALIGNMENT = 64  # bytes, a cache line
_FILLER, _RECEIVER = 0, 1  # who may hold a slot: the process that filled it, the one it was sent to


@dataclass(frozen=True)
class Lease:
    """A slot in the hands of this process: `claim` names the process and tells this use of the slot from any other."""

    slot: int
    claim: int


class SlotRing:
    """`count` slots of shared memory, each with room for the tensors of `layout`, whose first axis is the batch.

    Tensors of a slot are views of it, and the slot is used again when nothing refers to its memory any more, in the
    process that filled it and in the one it was sent to: no batch ever changes under the one who holds it. Slots of
    a process that died are free.

    The memory has no name and no place in /dev/shm: nothing is left of it however its processes end, and a
    container's small /dev/shm does not limit it. What was never used takes no memory. A worker process inherits the
    ring of its parent, or is given it when it starts; any number of processes and threads may use it at once.
    """

    def __init__(self, layout: Layout, count: int) -> None:
        size = _header_size(count) + count * _slot_size(layout)
        self._setup(layout, count, nameless_file(size), os.getpid())

    def _setup(self, layout: Layout, count: int, fd: int, creator: int) -> None:
        self.layout, self.count, self.slot_size = dict(layout), count, _slot_size(layout)
        self._fd, self._creator = fd, creator
        weakref.finalize(self, os.close, fd)
        head = _header_size(count)
        whole = mmap.mmap(fd, head + count * self.slot_size)
        # For each slot the claims of its filler and its receiver, 0 where there is none.
        self._holders = np.frombuffer(whole, dtype=np.int64, count=2 * count).reshape(count, 2)
        self._memory = np.frombuffer(whole, dtype=np.uint8, offset=head)
        self._views: dict[int, weakref.ref[Any]] = {}
        self._copies: QueuedCopies | None = None  # once the memory is page-locked
        self._lock_pid, self._lock = os.getpid(), threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self.layout, self.count, reduction.DupFd(self._fd), self._creator)

    def take(self) -> Lease | None:
        """Return a slot for this process to fill, None if all are in use."""
        self.reclaim()
        with self._exclusive():
            for slot in range(self.count):
                if not any(_alive(int(claim)) for claim in self._holders[slot]):
                    claim = _new_claim()
                    self._holders[slot] = claim, 0
                    return Lease(slot, claim)
        return None

    def tensors(self, lease: Lease, rows: int, *, received: bool = False) -> dict[str, torch.Tensor]:
        """Return the first `rows` rows of a slot's tensors. The lease ends when the last view of them is gone."""
        memory = self._memory[lease.slot * self.slot_size : (lease.slot + 1) * self.slot_size]
        # The callback must not refer to the ring: a ring that nobody uses is to vanish.
        done = partial(_end_lease, self._holders, self._copies, lease, int(received))
        self._views[lease.claim] = weakref.ref(memory, partial(_forget, self._views, lease.claim, done))
        return _carve(memory, self.layout, rows)

    def send(self, lease: Lease) -> bool:
        """Make a slot that this worker process filled receivable by its parent; False if it must be copied instead."""
        parent = parent_process()
        if parent is None or parent.pid != self._creator or lease.claim >> 32 != os.getpid():
            return False
        with self._exclusive():
            filler, receiver = (int(claim) for claim in self._holders[lease.slot])
            if filler != lease.claim or _alive(receiver):
                return False
            self._holders[lease.slot, _RECEIVER] = lease.claim
        return True

    def receive(self, lease: Lease) -> Lease:
        """Take over a slot that was sent; raises LoaderError if its sender died and another process has it now."""
        with self._exclusive():
            if self._holders[lease.slot, _RECEIVER] != lease.claim:
                raise LoaderError("a batch was lost with the worker process that read it; iterate again")
            claim = _new_claim()
            self._holders[lease.slot, _RECEIVER] = claim
        return Lease(lease.slot, claim)

    def pin(self) -> None:
        """Page-lock the memory for this process's copies to a CUDA device; raises LoaderError if the system refuses."""
        address, runtime = self._memory.ctypes.data, torch.cuda.cudart()
        if int(runtime.cudaHostRegister(address, self._memory.nbytes, 0)) != 0:
            raise LoaderError(f"cannot page-lock {self._memory.nbytes / 1e6:.0f} MB for batches; use pin_memory=False")
        weakref.finalize(self._memory, _unlock, runtime, address, os.getpid())
        self._copies = QueuedCopies()

    def copied(self, lease: Lease, device: torch.device) -> None:
        """Say that the tensors of a slot are being copied to `device`, on the stream that is current there."""
        if self._copies is not None:
            self._copies.add(lease.claim, device)

    def reclaim(self) -> None:
        """Free the slots of batches that were let go of and whose copies to CUDA devices are done by now."""
        for slot, claim in self._copies.done() if self._copies is not None else ():
            self._holders[slot, np.flatnonzero(self._holders[slot] == claim)] = 0

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._lock_pid != os.getpid():
            # Another thread may have held the lock at the moment of the fork.
            self._lock_pid, self._lock = os.getpid(), threading.Lock()
        # The file's lock is between processes, and ends with a process that dies in here.
        with self._lock:
            fcntl.lockf(self._fd, fcntl.LOCK_EX, 1)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1)


class OwnsRing:
    """What has a ring `_ring` of its own in every process that was not given it when it started.

    Only a process that is being started can be given memory; any other copy makes its own, by `_make_ring`.
    """

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if get_spawning_popen() is None:
            del state["_ring"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_ring" not in state:
            self._make_ring()

    def _make_ring(self) -> None:
        raise NotImplementedError


def allocate(layout: Layout, rows: int) -> dict[str, torch.Tensor]:
    """Return tensors like those of a slot, in memory of their own."""
    return {name: torch.empty((rows, *shape[1:]), dtype=dtype) for name, (shape, dtype) in layout.items()}


_claims = itertools.count(1)


def _new_claim() -> int:
    return os.getpid() << 32 | next(_claims) & 0xFFFFFFFF


def _alive(claim: int) -> bool:
    """Say whether the process of a claim lives; no claim, 0, does not."""
    if claim == 0:
        return False
    try:
        os.kill(claim >> 32, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _forget(views: dict[int, Any], claim: int, done: Any, reference: weakref.ref[Any]) -> None:
    views.pop(claim, None)
    done()


def _end_lease(holders: Any, copies: QueuedCopies | None, lease: Lease, place: int) -> None:
    if lease.claim >> 32 != os.getpid():
        return  # a forked process lets go of what its parent holds
    if copies is not None and copies.here:
        copies.let_go(lease.slot, lease.claim)
        return
    holders[lease.slot, place] = 0


def _unlock(runtime: Any, address: int, process: int) -> None:
    if os.getpid() == process:
        runtime.cudaHostUnregister(address)


def _carve(memory: np.ndarray[Any, Any], layout: Layout, rows: int) -> dict[str, torch.Tensor]:
    # One storage for all: it keeps `memory` alive, so that a reference to `memory` tells when all of them are gone.
    whole, tensors, start = torch.from_numpy(memory), {}, 0
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        tensors[name] = whole[start : start + size].view(dtype).view(shape)[:rows]
        start += _aligned(size, _ALIGNMENT)
    return tensors


def _slot_size(layout: Layout) -> int:
    sizes = [_aligned(math.prod(shape) * dtype.itemsize, _ALIGNMENT) for shape, dtype in layout.values()]
    return _aligned(max(1, sum(sizes)), mmap.PAGESIZE)


def _header_size(count: int) -> int:
    return _aligned(2 * 8 * count, mmap.PAGESIZE)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


def nameless_file(size: int) -> int:
    """Return the descriptor of a file of zeros in memory that vanishes with the last process that has it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("dit-distill-batches")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def _attach(layout: Layout, count: int, handle: Any, creator: int) -> SlotRing:
    ring = SlotRing.__new__(SlotRing)
    ring._setup(layout, count, handle.detach(), creator)
    return ring

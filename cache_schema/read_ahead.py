"""Batches made ahead of time, in order, by worker processes or a thread."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

import torch

from cache_schema.errors import LoaderError

PREFETCH = 2  # batches per worker

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """`get(update)` is `make(update)`, made ahead where updates are asked for one after the other.

    `make` is a pure function. `workers` processes, or one thread with `in_thread`, make the next batches while the
    caller works; without either a batch is made when it is asked for. Only batches before update `stop` are made ahead.
    A worker leaves Ctrl-C to this process, and ends with it.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        workers: int = 0,
        *,
        in_thread: bool = False,
        stop: int | None = None,
        start_method: str | None = None,
    ) -> None:
        self._make, self._workers, self._stop = make, workers, stop
        self._in_thread = in_thread and not workers
        self._context = multiprocessing.get_context(start_method)
        self._executor: Executor | None = None
        self._pending: deque[tuple[int, Future[T]]] = deque()

    @property
    def depth(self) -> int:
        """How many batches are made ahead."""
        return PREFETCH * (self._workers or int(self._in_thread))

    def get(self, update: int) -> T:
        """Return a batch; raises what `make` raises, and LoaderError if a worker process died."""
        if not self.depth or (self._stop is not None and update >= self._stop):
            return self._make(update)
        try:
            if self._pending and self._pending[0][0] != update:
                self._pending.clear()  # they are made all the same: a pool that breaks may not meet a cancelled one
            self._submit(update)
            future = self._pending[0][1]
            try:
                batch = future.result()
            finally:
                if future.done():
                    self._pending.popleft()
            self._submit(update + 1)
        except BrokenProcessPool as error:
            self.close()
            raise LoaderError(
                "a worker process of the loader was killed, often because memory ran out; try fewer workers or "
                "smaller batches"
            ) from error
        return batch

    def close(self) -> None:
        """End the workers; another `get` would start new ones."""
        self._pending.clear()
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, update: int) -> None:
        """Ask for `update` and those after it, as many as are made ahead."""
        after = self._pending[-1][0] + 1 if self._pending else update
        stop = update + self.depth if self._stop is None else min(update + self.depth, self._stop)
        for number in range(after, stop):
            self._pending.append((number, self._start(number)))

    def _start(self, update: int) -> Future[T]:
        if self._executor is None:
            self._executor = self._make_executor()
        if self._in_thread:
            return self._executor.submit(self._make, update)
        return self._executor.submit(_make_in_worker, update)

    def _make_executor(self) -> Executor:
        if self._in_thread:
            return ThreadPoolExecutor(1, thread_name_prefix="batches")
        return ProcessPoolExecutor(
            self._workers, mp_context=self._context, initializer=_start_worker, initargs=(self._make,)
        )


_make: Callable[[int], Any] | None = None  # in a worker process


def _make_in_worker(update: int) -> Any:
    assert _make is not None
    return _make(update)


def _start_worker(make: Callable[[int], Any]) -> None:
    # A terminal's Ctrl-C and a scheduler's SIGTERM reach every process; the parent alone decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler that a forked process has from its parent
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # As PyTorch's workers: after a fork the parent's team of OpenMP threads does not exist and would be waited for.
    torch.set_num_threads(1)
    global _make
    _make = make


def _end_by_parent() -> None:
    """End at a SIGTERM of the parent, which sends one to the others when a worker died, and at no one else's."""
    parent = multiprocessing.parent_process()
    while parent is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

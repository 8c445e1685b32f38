"""What a loop will need next, made while it works: in order, bounded, by threads or by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from cache_schema.errors import LoaderError

PREFETCH = 2  # made ahead per thread or process
_LOOK = 0.2  # seconds between questions whether a result is still waited for
# What is being made has so many seconds to come to its end: of a server that died, nothing comes for minutes.
_GRACE = 5.0

T = TypeVar("T")
R = TypeVar("R")


class ReadAhead(Generic[T, R]):
    """Runs `make` on the items of a loop before the loop comes to them.

    ```python
    with ReadAhead(make, threads=4) as ahead:
        for result in ahead.over(items):  # make(item) for each, in order
            ...
    ```

    `threads`, or worker `processes`, run `make` on `depth` items ahead, by default two for each; without either it runs
    when its result is asked for. Items are drawn in the caller's thread, none before it is among the next `depth`. What
    `make` raises arrives where its result would have. Processes are given `make` once, by fork or pickled, as
    `start_method` has it; they leave Ctrl-C to this process, and end with it.

    `depth` may be a function, asked each time: as long as it returns 0, items are made when the loop comes to them.
    """

    def __init__(
        self,
        make: Callable[[T], R],
        *,
        threads: int = 0,
        processes: int = 0,
        depth: int | Callable[[], int] | None = None,
        start_method: str | None = None,
    ) -> None:
        self._make, self._threads, self._processes = make, threads, processes
        workers = processes or threads
        self._depth = PREFETCH * workers if depth is None or not workers else depth
        self._context = multiprocessing.get_context(start_method)
        self._executor: Executor | None = None

    @property
    def depth(self) -> int:
        """How many items are made ahead now."""
        return self._depth() if callable(self._depth) else self._depth

    def over(self, items: Iterable[T], unless: Callable[[], bool] | None = None) -> Generator[R, None, None]:
        """Yield `make(item)` for each item, in order; raises what it raises, and LoaderError if a process died.

        Workers stay for a next call. What was made ahead for a loop that is not run to its end is dropped. Where
        `unless` is given and says so, a result that is not there yet is not waited for, and nothing more is yielded.
        """
        source, pending = iter(items), deque[Future[R]]()
        try:
            self._start_more(pending, source)
            while _arrives(pending, unless) and (result := self._next(pending, source)):
                self._start_more(pending, source)
                yield result.pop()  # not kept here: its memory may be used again as soon as the loop lets go of it
        except BrokenProcessPool as error:
            self.close()
            raise LoaderError(
                "a worker process of the loader was killed, often because memory ran out; try fewer workers or "
                "smaller batches"
            ) from error

    def close(self) -> None:
        """End the workers, after what they are making now; a next `over` would start new ones.

        Where that takes more than a few seconds, processes are killed, and threads are left to come to their end.
        """
        executor, self._executor = self._executor, None
        if executor is not None:
            _end(executor)

    def __enter__(self) -> ReadAhead[T, R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _start_more(self, pending: deque[Future[R]], source: Iterator[T]) -> None:
        pending.extend(map(self._start, islice(source, max(0, self.depth - len(pending)))))

    def _next(self, pending: deque[Future[R]], source: Iterator[T]) -> list[R]:
        """Return the next result alone in a list, which is empty after the last."""
        if pending:
            return [pending.popleft().result()]
        return [self._make(item) for item in islice(source, 1)]

    def _start(self, item: T) -> Future[R]:
        if self._executor is None:
            self._executor = self._make_executor()
        if self._processes:
            return self._executor.submit(_make_in_worker, item)
        return self._executor.submit(self._make, item)

    def _make_executor(self) -> Executor:
        if not self._processes:
            return ThreadPoolExecutor(self._threads, thread_name_prefix="ahead")
        return ProcessPoolExecutor(
            self._processes, mp_context=self._context, initializer=_start_worker, initargs=(self._make,)
        )


def _arrives(pending: deque[Future[R]], unless: Callable[[], bool] | None) -> bool:
    """Wait until the next result is there, if one is on its way; False where `unless` said that nobody waits."""
    while unless is not None and pending and not pending[0].done():
        if unless():
            return False
        wait([pending[0]], timeout=_LOOK)
    return True


def _end(executor: Executor) -> None:
    # There is no public way yet to end an executor whose workers hang.
    processes = list((getattr(executor, "_processes", None) or {}).values())
    manager = getattr(executor, "_executor_manager_thread", None)
    threads = list(getattr(executor, "_threads", ())) if manager is None else [manager]
    executor.shutdown(wait=False, cancel_futures=True)
    until = time.monotonic() + _GRACE
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if manager is not None and manager.is_alive():
        for process in processes:
            process.kill()
        manager.join()


_make: Callable[[Any], Any] | None = None  # in a worker process


def _make_in_worker(item: Any) -> Any:
    assert _make is not None
    return _make(item)


def _start_worker(make: Callable[[Any], Any]) -> None:
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

"""What a batch needs from a distance: fetched by many requests at once, in stretches that fit in memory twice."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from cache_schema.storage.stretches import DistantFile, Stretch

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 64 << 20  # bytes
_FILES = 16  # opened at once


def stretches(sizes: Sequence[int]) -> Iterator[range]:
    """Yield ranges of indices whose sizes are together what is fetched at once, or one larger thing alone."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > AT_ONCE:
            yield range(start, i)
            start, total = i, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))


@contextmanager
def fetched(wanted: Sequence[tuple[DistantFile, Sequence[tuple[int, int]]]]) -> Iterator[list[Stretch]]:
    """Yield for every file what its ranges (offset, size) can be read from; raises what `Asked.arrived` raises."""
    with ExitStack() as stack:
        asked = []
        # All files are asked before the first answer is waited for.
        for file, ranges in wanted:
            asked.append(file.ask(ranges))
            stack.callback(asked[-1].close)
        yield [each.arrived() for each in asked]


def at_once(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return `work(item)` for each item, in order, done by threads; the first failure is raised, once all are done."""
    if len(items) < 2:
        return [work(item) for item in items]
    threads = _threads(os.getpid())
    done = [threads.submit(work, item) for item in items]
    try:
        return [each.result() for each in done]
    except Exception:
        for each in done:
            each.cancel()
        # They may write into memory that the caller uses again.
        wait(done)
        raise


@functools.lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_FILES, thread_name_prefix=f"files-{process}")

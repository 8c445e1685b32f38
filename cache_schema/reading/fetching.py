"""What a batch needs from a distance: fetched by many requests at once, in stretches that fit in memory twice."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cache_schema.storage.folder import ReadableFile

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 64 << 20  # bytes
_FILES = 16  # read from at once, each by several requests


@dataclass(frozen=True)
class FetchedFile:
    """A stretch of a file in memory, which is read as the file would be."""

    path: str
    offset: int
    data: bytes

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` of the file, which is inside the stretch."""
        start = offset - self.offset
        view[:] = self.data[start : start + view.nbytes]


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


def fetch(wanted: Sequence[tuple[ReadableFile, int, int]]) -> list[bytes]:
    """Return the bytes of every (file, offset, size), in their order; raises what `read_ranges` raises."""
    by_file: dict[int, list[int]] = {}
    for i, (file, _, _) in enumerate(wanted):
        by_file.setdefault(id(file), []).append(i)
    groups = list(by_file.values())
    parts = at_once(lambda group: wanted[group[0]][0].read_ranges([wanted[i][1:] for i in group]), groups)
    found: list[bytes] = [b""] * len(wanted)
    for group, part in zip(groups, parts, strict=True):
        for i, data in zip(group, part, strict=True):
            found[i] = data
    return found


def at_once(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Return `work(item)` for each item, in order, done by threads; the first failure is raised."""
    if len(items) < 2:
        return [work(item) for item in items]
    return list(_threads(os.getpid()).map(work, items))


@functools.lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_FILES, thread_name_prefix=f"files-{process}")

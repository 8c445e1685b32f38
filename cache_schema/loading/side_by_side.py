"""How many batches are made at once: several while reading has to wait, one where all of it is in memory here."""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Generic, TypeVar

from cache_schema.read_ahead import ReadAhead
from cache_schema.reading.reader import Cache
from cache_schema.storage.places import is_remote

# While one waits for its last answers, of a network or of a disk, those of the others are on their way.
AT_ONCE = 4

T = TypeVar("T")
R = TypeVar("R")


def reading_ahead(
    make: Callable[[T], R],
    caches: Sequence[Cache],
    *,
    workers: int,
    depth: int | None = None,
    calm: int = 0,
    start_method: str | None = None,
) -> ReadAhead[T, R]:
    """Return what makes batches of `caches` ahead: `depth` of them by worker processes, or by threads.

    Threads make several at once while a cache has to be waited for, and `calm` batches, one by one, while all that is
    read is in memory. `start_method`: of processes; by default "spawn" where a cache is elsewhere.
    """
    if start_method is None and any(is_remote(cache.folder.location) for cache in caches):
        # Clients of remote places have threads, which a forked process would wait for in vain.
        start_method = "spawn"
    if workers:
        return ReadAhead(make, processes=workers, depth=depth, start_method=start_method)
    side_by_side = _SideBySide(make, caches)
    return ReadAhead(side_by_side, threads=AT_ONCE, depth=lambda: AT_ONCE if side_by_side.waits else calm)


class _SideBySide(Generic[T, R]):
    """`make` for several threads to call: they work side by side while a cache has to be waited for, else in turns.

    What is in memory is read, and made a batch of, faster by one thread than by several, above all beside training.
    """

    def __init__(self, make: Callable[[T], R], caches: Sequence[Cache]) -> None:
        self._make, self._caches = make, caches
        self._turn = threading.Lock()

    @property
    def waits(self) -> bool:
        """Whether the last reads of one of the caches had to wait for a network or a disk."""
        return any(cache.waits for cache in self._caches)

    def __call__(self, item: T) -> R:
        with nullcontext() if self.waits else self._turn:
            return self._make(item)

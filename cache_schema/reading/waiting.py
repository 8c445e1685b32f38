"""Whether reading waits, for a disk or for a network, so that it is worth to have several reads wait at once."""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Threads that share a batch. Two are enough for the disks that were tried; more cost nothing while they wait.
SIDE_BY_SIDE = 4
# Bytes a second, and seconds that a read takes besides: what is slower came from a disk, for the page cache gives
# several times as much. Neither does a disk answer as quickly as a system call.
_SLOW, _CALL = 3e9, 20e-6
_ENOUGH = 8 << 20  # bytes, of which the time says something: of few, a single answer of the disk decides
_SECTOR = 512  # bytes that the kernel counts as one
_SHARE = 1 / 8  # of what was read: so much came from a disk where reading it is worth to be done ahead
# Reads in a row that found all they wanted here, after which the next is expected to.
_CALM = 4


class DiskPace:
    """How fast the last reads were, and where from. From the page cache one thread is the fastest, above all beside
    other work.

    slow: whether a batch is worth several threads. from_disk: whether its bytes came from a disk, as the kernel counts
    for this process; what a file system does not have counted, as some of other machines, came from none.
    """

    def __init__(self) -> None:
        self.slow, self.from_disk = True, False
        self._size, self._reads, self._seconds, self._sectors = 0, 0, 0.0, _sectors_read()

    @contextmanager
    def over(self, size: int, reads: int) -> Iterator[None]:
        """Note how long reading `size` bytes takes, by so many system calls."""
        started = time.perf_counter()
        yield
        self._size += size
        self._reads += reads
        self._seconds += time.perf_counter() - started
        if self._size >= _ENOUGH:
            sectors = _sectors_read()
            self.slow = self._seconds > self._size / _SLOW + self._reads * _CALL
            self.from_disk = (sectors - self._sectors) * _SECTOR > self._size * _SHARE
            self._size, self._reads, self._seconds, self._sectors = 0, 0, 0.0, sectors


class FetchingPace:
    """Whether the last reads had to be fetched from a distance; `fetched` counts what was, so far."""

    def __init__(self, fetched: Callable[[], int]) -> None:
        self._fetched, self._calm = fetched, 0

    @property
    def fetching(self) -> bool:
        """Whether one of the last reads had to fetch something."""
        return self._calm < _CALM

    @contextmanager
    def over(self) -> Iterator[None]:
        """Note whether what is read meanwhile has to be fetched, by this read or by one beside it."""
        before = self._fetched()
        yield
        self._calm = self._calm + 1 if self._fetched() == before else 0


def _sectors_read() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock

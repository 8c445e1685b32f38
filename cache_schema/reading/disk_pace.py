"""Whether reading waits for a disk, so that it is worth to have several threads wait at once."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Threads that share a batch. Two are enough for the disks that were tried; more cost nothing while they wait.
SIDE_BY_SIDE = 4
# Bytes a second, and seconds that a read takes besides: what is slower came from a disk, for the page cache gives
# several times as much. Neither does a disk answer as quickly as a system call.
_SLOW, _CALL = 3e9, 20e-6
_ENOUGH = 8 << 20  # bytes, of which the time says something: of few, a single answer of the disk decides


class DiskPace:
    """How fast the last reads were. From the page cache one thread is the fastest, above all beside other work."""

    def __init__(self) -> None:
        self.slow = True
        self._size, self._reads, self._seconds = 0, 0, 0.0

    @contextmanager
    def over(self, size: int, reads: int) -> Iterator[None]:
        """Note how long reading `size` bytes takes, by so many system calls."""
        started = time.perf_counter()
        yield
        self._size += size
        self._reads += reads
        self._seconds += time.perf_counter() - started
        if self._size >= _ENOUGH:
            self.slow = self._seconds > self._size / _SLOW + self._reads * _CALL
            self._size, self._reads, self._seconds = 0, 0, 0.0

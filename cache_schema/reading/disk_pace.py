"""Reading from a disk that is slower than memory: what a batch needs next is asked for while it reads what is there."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cache_schema.storage.folder import ReadableFile
from cache_schema.storage.open_file import OpenFile

# Bytes that the disk is asked for before they are read: tens of requests in flight, small beside a page cache.
_AHEAD = 32 << 20
# Bytes a second. Slower, and some of it came from a disk; the page cache gives several times as much.
_SLOW = 3e9


class DiskPace:
    """Whether the disk is to be asked ahead, by how long reading took last; asking in vain costs a few per cent."""

    def __init__(self) -> None:
        self.slow = True
        self._size, self._seconds = 0, 0.0

    @contextmanager
    def over(self, size: int) -> Iterator[None]:
        """Note how long reading `size` bytes takes."""
        started = time.perf_counter()
        yield
        self._size += size
        self._seconds += time.perf_counter() - started
        # Of little, a single answer of the disk says nothing.
        if self._size >= _AHEAD // 4:
            self.slow = self._size < _SLOW * self._seconds
            self._size, self._seconds = 0, 0.0


class AskedAhead:
    """The places of a batch, of which the disk is asked for so many bytes beyond the one that is read."""

    def __init__(self, places: Sequence[tuple[ReadableFile, int, int]]) -> None:
        self._places, self._asked, self._read, self._beyond = places, 0, 0, 0

    def before(self, index: int) -> None:
        """Ask for what follows the place that is read next: indices ascend."""
        while self._read < index:
            self._beyond -= self._places[self._read][2]
            self._read += 1
        while self._asked < len(self._places) and self._beyond < _AHEAD:
            file, offset, size = self._places[self._asked]
            if isinstance(file, OpenFile):
                file.ask_disk(offset, size)
            self._asked += 1
            self._beyond += size

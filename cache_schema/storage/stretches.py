"""Stretches of files that were asked for from a distance: read as the files would be, once they are here."""

from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from cache_schema.storage.folder import ReadableFile


class Stretch(Protocol):
    """Ranges of a file that are on this machine. `path` says in messages where the file is."""

    path: str

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` of the file, which lie in one of the ranges; raises CacheCorrupt."""


class Asked(Protocol):
    """Ranges of a file that are on their way."""

    def arrived(self) -> Stretch:
        """Return what to read them from, when all are here; raises CacheCorrupt, CacheUnreachable."""

    def close(self) -> None:
        """Let go of what is kept here for them, which is not read any more."""


class DistantFile(ReadableFile, Protocol):
    """A file whose ranges can be asked for before they are waited for."""

    def ask(self, ranges: Sequence[tuple[int, int]]) -> Asked:
        """Have every (offset, size) fetched by several requests at once; raises CacheCorrupt for what it lacks."""


class AskedIntoMemory:
    """Ranges that arrive in memory, each by a request of its own, to be read there."""

    def __init__(self, path: str, offsets: Sequence[int], answers: Sequence[Future[memoryview]]) -> None:
        self.path = path
        order = sorted(range(len(offsets)), key=offsets.__getitem__)
        self._offsets, self._answers = [offsets[i] for i in order], [answers[i] for i in order]
        self._data: list[memoryview] = []

    def arrived(self) -> "AskedIntoMemory":
        """Return itself, when all ranges are here; raises what a request raised."""
        self._data = [answer.result() for answer in self._answers]
        return self

    def close(self) -> None:
        """Drop what nobody waits for any more."""
        for answer in self._answers:
            answer.cancel()

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` of the file."""
        place = bisect_right(self._offsets, offset) - 1
        start = offset - self._offsets[place]
        view[:] = self._data[place][start : start + view.nbytes]

"""Stretches of files that were asked for from a distance: read as the files would be, once they are here."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from cache_schema.storage.folder import ReadableFile


class Stretch(Protocol):
    """A part of a file that is on this machine. `path` says in messages where the file is."""

    path: str

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` of the file, which lie in the stretch; raises CacheCorrupt."""


class Asked(Protocol):
    """Ranges of a file that are on their way."""

    def arrived(self) -> Sequence[Stretch]:
        """Return a stretch for every range, when all are here; raises CacheCorrupt, CacheUnreachable."""

    def close(self) -> None:
        """Let go of what is kept here for them; their stretches are not read any more."""


class DistantFile(ReadableFile, Protocol):
    """A file whose ranges can be asked for before they are waited for."""

    def ask(self, ranges: Sequence[tuple[int, int]]) -> Asked:
        """Have every (offset, size) fetched by several requests at once; raises CacheCorrupt for what it lacks."""


@dataclass(frozen=True)
class InMemory:
    """A stretch whose bytes are in memory, from `offset` of the file on."""

    path: str
    offset: int
    data: memoryview

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` of the file."""
        start = offset - self.offset
        view[:] = self.data[start : start + view.nbytes]


class AskedIntoMemory:
    """Ranges that arrive in memory, each by a request of its own."""

    def __init__(self, path: str, offsets: Sequence[int], answers: Sequence[Future[memoryview]]) -> None:
        self._path, self._offsets, self._answers = path, offsets, answers

    def arrived(self) -> list[InMemory]:
        """Return a stretch for every range, when all are here; raises what its request raised."""
        pairs = zip(self._offsets, self._answers, strict=True)
        return [InMemory(self._path, offset, answer.result()) for offset, answer in pairs]

    def close(self) -> None:
        """Drop what nobody waits for any more."""
        for answer in self._answers:
            answer.cancel()

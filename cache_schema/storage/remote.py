"""A folder on another machine: what every kind of place has in common, over the few requests that differ."""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from cache_schema.errors import CacheCorrupt, CacheStorageError, CacheUnreachable
from cache_schema.interrupts import leaving
from cache_schema.storage.checksum import Bytes, crc32c
from cache_schema.storage.files import FileDigest, digest
from cache_schema.storage.folder import Signature
from cache_schema.storage.names import check_listed
from cache_schema.storage.retrying import Retrying
from cache_schema.storage.stretches import AskedIntoMemory

T = TypeVar("T")

REQUESTS = 32  # in flight at once, for one process
_BLOCK = 8 << 20  # of one request, where a whole file is read


@dataclass(frozen=True)
class Stat:
    """The size in bytes of a file and what tells it from another of its name: an entity tag, or a time."""

    size: int
    tag: str


class ChangedWhileRead(Exception):  # noqa: N818 -- reads as what happened
    """A file is not the one any more that was opened."""


class Place(Protocol):
    """The requests to one kind of place. Each may raise Transient, which is asked again, or a CacheError that is final.

    Names are those within the folder. An object may be used by any number of threads, and in a process forked from the
    one that made it.
    """

    writable: bool

    def stat(self, name: str) -> Stat | None:
        """Return size and tag of a file, None where there is none of this name."""

    def get(self, name: str, start: int, stop: int, tag: str) -> Bytes:
        """Return bytes [start, stop) of a file, fewer where it ends before.

        Raises FileNotFoundError, ChangedWhileRead.
        """

    def list_folder(self, under: str) -> list[str]:
        """Return the names of what is in a sub-folder; none where there is none."""

    def list_files(self) -> dict[str, int]:
        """Return the names of all files, at any depth, and their sizes."""

    def put(self, name: str, data: Bytes | Path, new: bool) -> bool:
        """Write a whole file, or the copy of one here; with `new` only where there is none. Say whether it was."""

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""


@runtime_checkable
class WholePlace(Place, Protocol):
    """A place that is asked for a small file by one request, rather than for its size first."""

    def whole(self, name: str, limit: int) -> tuple[int, Bytes] | None:
        """Return the size of a file and, if it is at most `limit`, its contents; None where there is none."""


@runtime_checkable
class CommittingPlace(Place, Protocol):
    """A place in which every change is a commit, so that files are written and removed many at once."""

    files_per_commit: int

    def commit(self, files: Mapping[str, Bytes | Path], remove: Sequence[str] = (), unless: str | None = None) -> bool:
        """Write and remove files at once, none of it where there is a file `unless`; say whether it was done."""

    def check_layout(self, files: Mapping[str, int]) -> None:
        """Raise CacheRequestError where files, by name and size in bytes, break the place's rules."""

    def is_public(self) -> bool:
        """Say whether everybody can read what is here."""


_ending = threading.Event()  # this process is about to end: nothing is asked for again


@functools.cache
def _requests(process: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix=f"requests-{process}")

    def end() -> None:
        _ending.set()
        leaving.set()
        pool.shutdown(wait=False, cancel_futures=True)

    # A process waits for its pools when it ends, before `atexit` is heard: for minutes, if a server does not answer.
    threading._register_atexit(end)  # type: ignore[attr-defined]
    return pool


def requests() -> ThreadPoolExecutor:
    """Return this process's threads for requests: none of a parent's survive a fork."""
    return _requests(os.getpid())


class RemoteFile:
    """A file of a remote folder, as it was when it was opened: one that was replaced since is refused."""

    def __init__(self, folder: "RemoteFolder", name: str, stat: Stat) -> None:
        self.path = folder.where(name)
        self.size = stat.size
        self.signature: Signature = (stat.tag, stat.size)
        self._folder, self._name, self._tag = folder, name, stat.tag

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; raises CacheCorrupt where the file does not have them."""
        return bytes(self.view(offset, size))

    def view(self, offset: int, size: int) -> memoryview:
        """Return what `read` does without a copy of it."""
        self._check(offset, size)
        return memoryview(self._get(offset, size) if size else b"")

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of every (offset, size), in their order, several at once; raises CacheCorrupt."""
        for offset, size in ranges:
            self._check(offset, size)
        if len(ranges) < 2:
            return [self.read(*each) for each in ranges]
        return list(requests().map(lambda each: self.read(*each), ranges))

    def ask(self, ranges: Sequence[tuple[int, int]]) -> AskedIntoMemory:
        """Have every (offset, size) fetched by several requests at once; raises CacheCorrupt for what it lacks."""
        for offset, size in ranges:
            self._check(offset, size)
        answers = [requests().submit(self.view, *each) for each in ranges]
        return AskedIntoMemory(self.path, [offset for offset, _ in ranges], answers)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset`; raises CacheCorrupt where the file does not have them."""
        view[:] = self.view(offset, view.nbytes)

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CacheCorrupt(f"{self.path} is truncated: it has no bytes {offset} to {offset + size}")

    def _get(self, offset: int, size: int) -> Bytes:
        try:
            data = self._folder.get(self._name, offset, offset + size, self._tag)
        except FileNotFoundError:
            raise CacheCorrupt(f"{self.path} is missing: it was removed while it was read") from None
        except ChangedWhileRead:
            raise CacheCorrupt(f"{self.path} was changed while it was read; open the cache again") from None
        if len(data) != size:
            raise CacheCorrupt(f"{self.path} is truncated: bytes {offset} to {offset + size} came as {len(data)}")
        return data


class RemoteFolder:
    """A folder at a URL; see `cache_schema.storage.folder.Folder`. May be forked and shared by threads."""

    def __init__(self, url: str, place: Place, retrying: Retrying | None = None) -> None:
        self.url = url.rstrip("/")
        self.place = place
        self._retrying = retrying or Retrying()
        self._answered = False

    @property
    def writable(self) -> bool:
        """Whether this kind of place is written to at all."""
        return self.place.writable

    @property
    def location(self) -> str:
        """The URL."""
        return self.url

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemoteFolder({self.url!r})"

    def where(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}"

    def with_patience(self, retrying: Retrying) -> "RemoteFolder":
        """Return the same folder, whose requests are repeated as long as that says."""
        return RemoteFolder(self.url, self.place, retrying)

    def _call(self, where: str, ask: Callable[[], T]) -> T:
        def ask_unless_ending() -> T:
            if _ending.is_set():
                raise CacheUnreachable(f"{where} is not asked for any more: this process ends")
            return ask()

        # A place that never answered is more likely misspelt than busy.
        patience = self._retrying if self._answered else self._retrying.until_first_answer()
        answer = patience.call(where, ask_unless_ending)
        self._answered = True
        return answer

    def get(self, name: str, start: int, stop: int, tag: str) -> Bytes:
        """Return bytes [start, stop) of a file as it was when its `tag` was asked for; see `Place.get`."""
        return self._call(self.where(name), lambda: self.place.get(name, start, stop, tag))

    def stat(self, name: str) -> Stat | None:
        """Return size and tag of a file, None where there is none of this name."""
        return self._call(self.where(name), lambda: self.place.stat(name))

    def open(self, name: str) -> RemoteFile:
        """Open a file for reading; raises CacheCorrupt where it is missing, CacheUnreachable."""
        stat = self.stat(name)
        if stat is None:
            raise CacheCorrupt(f"{self.where(name)} is missing")
        return RemoteFile(self, name, stat)

    def read_bounded(self, name: str, limit: int) -> bytes:
        """Return the whole of a file of at most `limit` bytes.

        Raises FileNotFoundError, CacheCorrupt for a larger one, CacheUnreachable.
        """
        size, data = self._whole(name, limit)
        if size > limit:
            raise CacheCorrupt(f"{self.where(name)} is larger than the {limit} bytes such a file may have")
        if len(data) != size:
            raise CacheCorrupt(f"{self.where(name)} is truncated: {len(data)} of {size} bytes came")
        return bytes(data)

    def _whole(self, name: str, limit: int) -> tuple[int, Bytes]:
        """Return the size of a file and, if it is at most `limit`, its contents; raises FileNotFoundError."""
        place = self.place
        if isinstance(place, WholePlace):
            found = self._call(self.where(name), lambda: place.whole(name, limit))
        else:
            stat = self.stat(name)
            found = None
            if stat is not None:
                found = stat.size, RemoteFile(self, name, stat).read(0, stat.size) if stat.size <= limit else b""
        if found is None:
            raise FileNotFoundError(f"{self.where(name)} is missing")
        return found

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of every (offset, size) of a file; raises CacheCorrupt where it does not have them."""
        return self.open(name).read_ranges(ranges)

    def digest(self, name: str) -> FileDigest:
        """Return size and checksum of a whole file, all of which is fetched for it; raises FileNotFoundError."""
        stat = self.stat(name)
        if stat is None:
            raise FileNotFoundError(f"{self.where(name)} is missing")
        checksum = 0
        for block in self.blocks(name, stat):
            checksum = crc32c(block, checksum)
        return FileDigest(stat.size, f"{checksum:08x}")

    def blocks(self, name: str, stat: Stat) -> Iterator[Bytes]:
        """Yield the contents of a file, a block at a time, the next one on its way; raises CacheCorrupt."""
        file = RemoteFile(self, name, stat)
        ranges = ((start, min(_BLOCK, stat.size - start)) for start in range(0, stat.size, _BLOCK))
        pending = None
        for each in ranges:
            following = requests().submit(file.view, *each)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()

    def exists(self, name: str) -> bool:
        """Say whether there is a file of this name, or any under it."""
        return self.stat(name) is not None or bool(self.names(name))

    def size(self, name: str) -> int | None:
        """Return the size in bytes of a file, None where there is none of this name."""
        stat = self.stat(name)
        return None if stat is None else stat.size

    def is_link(self, name: str) -> bool:
        """Say no: remote places have none, or do not show them."""
        return False

    def names(self, under: str = "") -> list[str]:
        """Return the names of what is in a sub-folder; raises CacheCorrupt for one that could not lie there."""
        where = self.where(under) if under else self.url
        found = self._call(where, lambda: self.place.list_folder(under))
        return [check_listed(name, where) for name in found]

    def walk(self) -> Iterator[str]:
        """Yield the names of all files at any depth, sorted; raises CacheCorrupt as `names` does."""
        yield from sorted(self.files())

    def files(self) -> dict[str, int]:
        """Return the names and sizes of all files, by one listing; raises CacheCorrupt as `names` does."""
        found = self._call(self.url, self.place.list_files)
        return {check_listed(name, self.url): size for name, size in found.items()}

    def write(self, name: str, data: Bytes) -> FileDigest:
        """Write a whole file, in place of the one of this name; raises CacheStorageError."""
        self._put(name, data, new=False)
        return digest(data)

    def write_new(self, name: str, data: Bytes) -> bool:
        """Write a whole file unless there is one of this name; say whether it was written."""
        return self._put(name, data, new=True)

    def upload(self, name: str, path: Path) -> None:
        """Write a copy of a file of this machine, in place of the one of this name."""
        self._put(name, path, new=False)

    def delete(self, name: str) -> None:
        """Remove a file; raises CacheStorageError."""
        self._check_writable(name)
        self._call(self.where(name), lambda: self.place.delete(name))

    @property
    def committing(self) -> CommittingPlace | None:
        """The place, where files are written there in commits; None elsewhere."""
        return self.place if isinstance(self.place, CommittingPlace) else None

    def commit(self, files: Mapping[str, Bytes | Path], remove: Sequence[str] = (), unless: str | None = None) -> bool:
        """Write and remove files in one commit; see `CommittingPlace.commit`, whose kind this place must be."""
        place = self.committing
        assert place is not None
        return self._call(self.url, lambda: place.commit(files, remove, unless))

    def _put(self, name: str, data: Bytes | Path, new: bool) -> bool:
        self._check_writable(name)
        return self._call(self.where(name), lambda: self.place.put(name, data, new))

    def _check_writable(self, name: str) -> None:
        if not self.writable:
            raise CacheStorageError(f"cannot write {self.where(name)}: this kind of place is only read here")

"""A remote folder whose files are read in blocks, which a local disk keeps: fetched once, then read as local ones."""

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from cache_schema.errors import CacheCorrupt, CacheError
from cache_schema.storage.blocks import BLOCK, BlockFile, BlockStore, NoRoom, blocks_of, default_folder
from cache_schema.storage.folder import Folder, Signature
from cache_schema.storage.local import LocalFolder
from cache_schema.storage.places import Location, folder_at
from cache_schema.storage.remote import RemoteFile, RemoteFolder, requests
from cache_schema.storage.retrying import STREAMING_DEADLINE, Retrying, patience
from cache_schema.storage.stretches import Asked

DEFAULT_BOUND = "10GB"
_MOST_BLOCKS = 32  # of one request
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class StreamedFolder(RemoteFolder):
    """A remote folder behind a store of blocks. What is read whole, small files, is asked for each time."""

    def __init__(self, remote: RemoteFolder, blocks: BlockStore) -> None:
        super().__init__(remote.url, remote.place, remote._retrying)
        self.blocks_here = blocks

    def open(self, name: str) -> "StreamedFile":  # type: ignore[override]
        """Open a file for reading; raises CacheCorrupt where it is missing, CacheUnreachable."""
        return StreamedFile(super().open(name), self.blocks_here)


class StreamedFile:
    """A remote file read by way of the blocks that are here; see `cache_schema.storage.stretches.DistantFile`.

    Blocks that lie between two that are asked for are not fetched, nor twice what several threads ask for, so no more
    is moved than reading all of it moves.
    """

    def __init__(self, file: RemoteFile, store: BlockStore) -> None:
        self.path, self.size = file.path, file.size
        self.signature: Signature = file.signature
        self._file, self._store = file, store
        self._begin()

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; raises CacheCorrupt where the file does not have them."""
        return self.read_ranges([(offset, size)])[0]

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset`; raises CacheCorrupt where the file does not have them."""
        if self._process == os.getpid() and self._blocks.read_seen(view, offset):
            return
        with contextlib.closing(self.ask([(offset, view.nbytes)])) as asked:
            asked.arrived().read_into(view, offset)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of every (offset, size), what is missing here fetched by several requests at once."""
        found = []
        with contextlib.closing(self.ask(ranges)) as asked:
            stretch = asked.arrived()
            for offset, size in ranges:
                out = bytearray(size)
                stretch.read_into(memoryview(out), offset)
                found.append(bytes(out))
        return found

    def ask(self, ranges: Sequence[tuple[int, int]]) -> Asked:
        """Have fetched what is missing of every (offset, size); raises CacheCorrupt for what the file lacks."""
        for offset, size in ranges:
            if offset < 0 or size < 0 or offset + size > self.size:
                raise CacheCorrupt(f"{self.path} is truncated: it has no bytes {offset} to {offset + size}")
        if self._process != os.getpid():
            self._begin()
        try:
            self._blocks.acquire()
        except NoRoom:
            self._store.fetched += sum(len(blocks_of(*each)) for each in ranges)
            return self._file.ask(ranges)
        try:
            awaited = [] if self._blocks.has_seen(ranges) else self._on_their_way(ranges)
        except BaseException:
            self._blocks.release()
            raise
        return AskedBlocks(self.path, self._blocks, awaited)

    def keep(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Have every (offset, size) stay here until `let_go`, if all of them are known to be; say whether they are."""
        if self._process != os.getpid():
            return False
        try:
            self._blocks.acquire()
        except NoRoom:
            return False
        if self._blocks.has_seen(ranges):
            return True
        self._blocks.release()
        return False

    def let_go(self) -> None:
        """Let be removed what `keep` kept."""
        self._blocks.release()

    def forget(self) -> None:
        """Have everything fetched again."""
        with contextlib.suppress(NoRoom):  # then nothing is kept
            self._blocks.forget()

    def _begin(self) -> None:
        # A lock on a file that was opened before a fork would be the parent's as well, and so are its requests.
        self._process = os.getpid()
        self._blocks = self._store.file(self.path, str(self.signature[0]), self.size)
        self._lock = threading.Lock()
        self._pending: dict[int, Future[Fetched]] = {}

    def _on_their_way(self, ranges: Sequence[tuple[int, int]]) -> list["Future[Fetched]"]:
        """Ask for the blocks of ranges that are neither here nor asked for; return what brings those not here."""
        wanted = sorted({n for offset, size in ranges if size for n in blocks_of(offset, size)})
        awaited: dict[int, Future[Fetched]] = {}  # by its identity
        with self._lock:
            # First what is pending: a block is here before it ceases to be.
            pending = [self._pending[n] for n in wanted if n in self._pending]
            missing = [n for n in wanted if n not in self._pending and not self._blocks.has(n)]
            awaited |= {id(future): future for future in pending}
            self._store.fetched += len(missing)
            for run in _runs(missing):
                future = requests().submit(self._fetch, run[0], run[-1] + 1)
                awaited[id(future)] = future
                self._pending |= dict.fromkeys(run, future)
        return list(awaited.values())

    def _fetch(self, first: int, stop: int) -> "Fetched":
        """Fetch blocks [first, stop), keep them if there is room, and return them."""
        start = first * BLOCK
        try:
            data = self._file.view(start, min(stop * BLOCK, self.size) - start)
            with contextlib.suppress(NoRoom), self._blocks.lease():
                self._blocks.put({n: data[n * BLOCK - start : (n + 1) * BLOCK - start] for n in range(first, stop)})
            return Fetched(first, data)
        finally:
            with self._lock:
                for number in range(first, stop):
                    self._pending.pop(number, None)


@dataclass(frozen=True)
class Fetched:
    """Blocks that follow each other, in memory, from number `first` on."""

    first: int
    data: memoryview


class AskedBlocks:
    """Ranges of a streamed file, all read at one place: from blocks that are here, others from where they arrive."""

    def __init__(self, path: str, blocks: BlockFile, awaited: Sequence[Future[Fetched]]) -> None:
        """`blocks` are held by a lease, which `close` gives back."""
        self.path = path
        self._blocks, self._awaited = blocks, awaited
        self._fresh: dict[int, memoryview] = {}

    def arrived(self) -> "AskedBlocks":
        """Return itself, when all are here; raises what a request raised."""
        for future in self._awaited:
            fetched = future.result()
            for number, start in enumerate(range(0, len(fetched.data), BLOCK), fetched.first):
                self._fresh[number] = fetched.data[start : start + BLOCK]
        return self

    def close(self) -> None:
        """Let the blocks be removed."""
        self._blocks.release()

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` of the file; raises CacheCorrupt where the local copy lacks something."""
        at, size = 0, view.nbytes
        if not self._fresh:
            self._read_here(view, offset)
            return
        while at < size:
            number, inside = divmod(offset + at, BLOCK)
            if number in self._fresh:
                taken = min(BLOCK - inside, size - at)
                view[at : at + taken] = self._fresh[number][inside : inside + taken]
            else:
                stop = number + 1
                while stop * BLOCK < offset + size and stop not in self._fresh:
                    stop += 1
                taken = min(stop * BLOCK - offset - at, size - at)
                self._read_here(view[at : at + taken], offset + at)
            at += taken

    def _read_here(self, view: memoryview, offset: int) -> None:
        if not self._blocks.read_into(view, offset):
            raise CacheCorrupt(f"the local copy of {self.path} is truncated; run the same command again")


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Group ascending numbers that follow each other, at most so many in a group."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1 and len(runs[-1]) < _MOST_BLOCKS:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def parse_size(text: str) -> int:
    """Return a number of bytes such as 50GB; raises CacheError for what is none."""
    number = text.strip().upper().rstrip("KMGTB")
    unit = text.strip().upper()[len(number) :]
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise CacheError(f"{text!r} is no size; write for example 50GB or 800MB") from None


def reading_folder(location: Location, local_cache: str | None = None) -> Folder:
    """Return the folder at a path or a URL for reading again and again: a remote one keeps up to `local_cache` here.

    "0" keeps nothing. Raises CacheError for a size that is none or below what is in flight.
    """
    folder = folder_at(location)
    if isinstance(folder, LocalFolder):
        return folder
    assert isinstance(folder, RemoteFolder)
    bound = parse_size(local_cache or DEFAULT_BOUND)
    folder = folder.with_patience(Retrying(patience(STREAMING_DEADLINE)))
    return folder if bound == 0 else StreamedFolder(folder, BlockStore(default_folder(), bound))

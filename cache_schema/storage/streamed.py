"""A remote folder whose files are read in blocks, which a local disk keeps: fetched once, then read as local ones."""

import os
from collections.abc import Iterable, Sequence

from cache_schema.errors import CacheCorrupt, CacheError
from cache_schema.storage.blocks import BLOCK, BlockStore, default_folder
from cache_schema.storage.folder import Folder, Signature
from cache_schema.storage.local import LocalFolder
from cache_schema.storage.places import Location, folder_at
from cache_schema.storage.remote import RemoteFile, RemoteFolder
from cache_schema.storage.retrying import STREAMING_DEADLINE, Retrying, patience

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
    """A remote file read by way of the blocks that are here; see `cache_schema.storage.folder.ReadableFile`.

    Blocks that lie between two that are asked for are not fetched, so no more is moved than reading all of it moves.
    """

    def __init__(self, file: RemoteFile, store: BlockStore) -> None:
        self.path, self.size = file.path, file.size
        self.signature: Signature = file.signature
        self._file, self._store = file, store
        self._process = os.getpid()
        self._blocks = store.file(file.path, str(file.signature[0]), file.size)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; raises CacheCorrupt where the file does not have them."""
        return self.read_ranges([(offset, size)])[0]

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset`; raises CacheCorrupt where the file does not have them."""
        view[:] = self.read(offset, view.nbytes)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of every (offset, size), what is missing here fetched by several requests at once."""
        for offset, size in ranges:
            if offset < 0 or size < 0 or offset + size > self.size:
                raise CacheCorrupt(f"{self.path} is truncated: it has no bytes {offset} to {offset + size}")
        wanted = sorted({n for offset, size in ranges if size for n in _blocks_of(offset, size)})
        if self._process != os.getpid():
            # A lock on a file that was opened before a fork would be the parent's as well.
            self._process = os.getpid()
            self._blocks = self._store.file(self.path, str(self.signature[0]), self.size)
        with self._blocks.lease():
            fresh = self._fetch([number for number in wanted if not self._blocks.has(number)])
            return [self._assemble(offset, size, fresh) for offset, size in ranges]

    def forget(self) -> None:
        """Have everything fetched again."""
        self._blocks.forget()

    def _fetch(self, missing: list[int]) -> dict[int, memoryview]:
        spans = [(run[0], run[-1] + 1) for run in _runs(missing)]
        places = [(first * BLOCK, min(stop * BLOCK, self.size) - first * BLOCK) for first, stop in spans]
        fetched: dict[int, memoryview] = {}
        for (first, stop), data in zip(spans, self._file.read_ranges(places), strict=True):
            view = memoryview(data)
            fetched |= {n: view[(n - first) * BLOCK : (n - first + 1) * BLOCK] for n in range(first, stop)}
        if fetched:
            self._blocks.put(fetched)
        return fetched

    def _assemble(self, offset: int, size: int, fresh: dict[int, memoryview]) -> bytes:
        out = bytearray(size)
        view = memoryview(out)
        at = 0
        while at < size:
            number, inside = divmod(offset + at, BLOCK)
            if number in fresh:
                taken = min(BLOCK - inside, size - at)
                view[at : at + taken] = fresh[number][inside : inside + taken]
            else:
                stop = number + 1
                while stop * BLOCK < offset + size and stop not in fresh:
                    stop += 1
                taken = min(stop * BLOCK - offset - at, size - at)
                if not self._blocks.read_into(view[at : at + taken], offset + at):
                    raise CacheCorrupt(f"the local copy of {self.path} is truncated; run the same command again")
            at += taken
        return bytes(out)


def _blocks_of(offset: int, size: int) -> range:
    return range(offset // BLOCK, -(-(offset + size) // BLOCK))


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

"""Shard files kept open for reading: a bounded number of file descriptors and a bounded amount of index memory."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

from cache_schema.errors import CacheCorrupt
from cache_schema.shard import ShardIndex

MAX_OPEN_FILES = 128
MAX_INDEX_BYTES = 32 << 20

Signature = tuple[int, int, int]


class OpenFile:
    """A file open for reading at given places; closed when the last one that uses it lets go."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CacheCorrupt(f"cannot read {path}: {error.strerror}; `dit-cache verify` lists all damage") from error
        status = os.fstat(self._fd)
        self.size = status.st_size
        self.signature: Signature = (status.st_ino, status.st_size, status.st_mtime_ns)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; raises CacheCorrupt where the file does not have them."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CacheCorrupt(f"{self.path} is truncated: it has no bytes {offset} to {offset + size}")
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset`; raises CacheCorrupt where the file does not have them."""
        got = os.preadv(self._fd, [view], offset)
        while got < view.nbytes:
            # Linux reads at most 2 GB at once, and fewer where a signal interrupts.
            more = os.preadv(self._fd, [view[got:]], offset + got)
            if more == 0:
                raise CacheCorrupt(f"{self.path} is truncated; `dit-cache verify` lists all damage")
            got += more


class OpenShards:
    """The most recently used files and chunk indexes. Safe to use from several threads."""

    def __init__(self, max_files: int = MAX_OPEN_FILES, max_index_bytes: int = MAX_INDEX_BYTES) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[str, OpenFile] = OrderedDict()
        self._indexes: OrderedDict[tuple[str, str], tuple[Signature, ShardIndex]] = OrderedDict()
        self._index_bytes = 0
        self._max_files, self._max_index_bytes = max_files, max_index_bytes

    def file(self, path: str) -> OpenFile:
        """Return the file, open. It stays open while the caller keeps it, even when it leaves the cache."""
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                self._files.move_to_end(path)
                return file
        file = OpenFile(path)
        with self._lock:
            self._files[path] = file
            while len(self._files) > self._max_files:
                self._files.popitem(last=False)
        return file

    def index(self, file: OpenFile, array: str, parse: Callable[[OpenFile], ShardIndex]) -> ShardIndex:
        """Return the chunk index of one array in an open file, parsed at most once while it is remembered."""
        key = (file.path, array)
        with self._lock:
            known = self._indexes.get(key)
            if known is not None and known[0] == file.signature:
                self._indexes.move_to_end(key)
                return known[1]
        index = parse(file)
        with self._lock:
            replaced = self._indexes.pop(key, None)
            self._indexes[key] = (file.signature, index)
            self._index_bytes += index.nbytes - (replaced[1].nbytes if replaced else 0)
            while self._index_bytes > self._max_index_bytes and len(self._indexes) > 1:
                self._index_bytes -= self._indexes.popitem(last=False)[1][1].nbytes
        return index

"""A file open for reading, at any place of it, by any number of threads."""

import os
import stat
from collections.abc import Sequence

from cache_schema.errors import CacheCorrupt
from cache_schema.storage.folder import Signature


class OpenFile:
    """A plain file open for reading at given places; closed when the last one that uses it lets go."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        try:
            # Without O_NONBLOCK, opening a named pipe that someone put here would wait for ever.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise CacheCorrupt(f"{path} is missing") from None
        except OSError as error:
            raise CacheCorrupt(f"{path} cannot be opened ({error.strerror})") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise CacheCorrupt(f"{path} is not a plain file")
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

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of every (offset, size), in their order; raises CacheCorrupt as `read` does."""
        return [self.read(offset, size) for offset, size in ranges]

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset`; raises CacheCorrupt where the file does not have them."""
        try:
            got = os.preadv(self._fd, [view], offset)
            while got < view.nbytes:
                # Linux reads at most 2 GB at once, and fewer where a signal interrupts.
                more = os.preadv(self._fd, [view[got:]], offset + got)
                if more == 0:
                    raise CacheCorrupt(f"{self.path} is truncated")
                got += more
        except OSError as error:
            raise CacheCorrupt(f"{self.path} cannot be read ({error.strerror})") from error

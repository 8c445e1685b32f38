"""Who computes what, where several builders share one cache: locks that the kernel drops when their holder ends.

A claim is an advisory lock on one byte of the layout's journal record, a file that every begun cache has and that is
not rewritten. So there is no lock file that a builder which dies could leave behind, in the cache or anywhere else.
"""

import contextlib
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterable, Iterator

from cache_schema.format.journal import Kind, is_committed, record_name
from cache_schema.storage.files import storage_errors
from cache_schema.storage.local import LocalFolder

# Bytes beyond the end of a file can be locked like any others; each kind of piece has a stretch of its own.
_STRETCH = 1 << 40
_KINDS: tuple[Kind, ...] = ("calibration", "features", "images")
_TAKEN = {errno.EAGAIN, errno.EACCES}


class Claims:
    """One builder's claims on the pieces of the cache in a folder, which must have been begun.

    Two objects exclude each other, also within one process; `close`, or the end of the process, drops all claims.
    Where the file system or the platform has no such locks every claim is granted: builders may then compute the same
    piece, and the first to commit it wins.
    """

    def __init__(self, folder: LocalFolder) -> None:
        self._folder = folder
        path = folder.path / record_name("layout")
        with storage_errors(path):
            # Writable, because only such a file may be locked exclusively; nothing is ever written.
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop every claim."""
        os.close(self._fd)

    def take(self, kind: Kind, shard: int = 0, *, wait: bool = False) -> bool:
        """Claim a piece; say whether it is ours now. With `wait`, wait until whoever has it drops it or dies."""
        try:
            self._lock(fcntl.F_WRLCK, kind, shard, wait)
        except OSError as error:
            # Anything else means that there are no locks here.
            return error.errno not in _TAKEN
        return True

    def drop(self, kind: Kind, shard: int = 0) -> None:
        """Give a claim up."""
        with contextlib.suppress(OSError):
            self._lock(fcntl.F_UNLCK, kind, shard, False)

    def missing(self, kind: Kind, shards: Iterable[int], *, wait: bool = False) -> Iterator[int]:
        """Claim and yield, one after the other, those of `shards` that nobody has committed or claimed.

        With `wait`, wait for each that another builder has: it is yielded only if that one gives up or dies. Do not
        wait while holding a claim on a piece that is yet to be computed: two builders could wait for each other.
        """
        for shard in shards:
            if is_committed(self._folder, kind, shard) or not self.take(kind, shard, wait=wait):
                continue
            # It may have been committed between the look and the claim.
            if is_committed(self._folder, kind, shard):
                self.drop(kind, shard)
            else:
                yield shard

    def _lock(self, operation: int, kind: Kind, shard: int, wait: bool) -> None:
        if not sys.platform.startswith("linux"):
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        # Locks of the open file rather than of the process: closing another descriptor of it must not drop them.
        command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
        start = _KINDS.index(kind) * _STRETCH + shard
        # struct flock: l_type, l_whence, l_start, l_len, l_pid (0 is required), in the platform's own layout.
        fcntl.fcntl(self._fd, command, struct.pack("@hhqqi0q", operation, os.SEEK_SET, start, 1, 0))

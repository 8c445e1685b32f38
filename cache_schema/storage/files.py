"""Files that are either wholly there or not there at all.

A file is written aside, flushed to the disk, renamed into place, and its directory flushed: whatever kills the
process, a reader sees the old state or the new one.
"""

import atexit
import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from cache_schema.errors import CacheCorrupt, CacheStorageError
from cache_schema.storage.checksum import Bytes, combine_crc32c, crc32c

_HOST = re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32] or "host"
# Tells this process from an earlier one with the same process id, as every run inside a container has.
_TOKEN = secrets.token_hex(4)
_SERIAL = count()
_ASIDE = re.compile(r"\.tmp-(?P<host>[A-Za-z0-9]+)-(?P<pid>[0-9]+)-(?P<token>[0-9a-f]+)-[0-9]+$")
# A file left aside by another machine is taken for dead after this long without a write, in seconds.
_FOREIGN_GRACE = 3600.0
_READ_BLOCK = 1 << 20
# The page cache keeps what one write brought in stretches of memory as large as the write, if it begins at a multiple
# of that in the file, and in many small ones otherwise: files written in blocks of 64 kB from the first byte on were
# read a third faster, up to three times where memory was scarce, than those written in pieces as they came.
# Larger writes make Linux look for larger stretches of free memory. On a virtual machine the host may have taken just
# these back: writes of 200 kB to 800 kB were up to ten times slower than those of 64 kB.
_WRITE_BLOCK = 64 << 10
# The system is asked to begin with the disk after so many bytes, so that less is left for the flush at the end, during
# which nothing else of a shard is done.
_BEGIN_FLUSH = 8 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # of a disk that is full, or of a share of it that is used up
# The files that this process is writing: a Ctrl-C can fall between any two steps of leaving a context.
_BEING_WRITTEN: set[Path] = set()
# Answers of file systems that have no hard links or no locks: not failures of this write.
_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF, errno.EMLINK}


@dataclass(frozen=True)
class FileDigest:
    """The size in bytes of a file and the CRC-32C of its contents as 8 hexadecimal digits."""

    bytes: int
    crc32c: str


def digest(data: Bytes) -> FileDigest:
    """Return the digest a file with these contents would have."""
    return FileDigest(len(data), f"{crc32c(data):08x}")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a refusal of the operating system to write at `path` into a CacheStorageError that says what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some of your quota",
            errno.EFBIG: "raise the file size limit",
            errno.EACCES: "get write permission there",
            errno.EPERM: "get write permission there",
            errno.EROFS: "choose a writable place",
        }.get(error.errno or 0, "mend that")
        raise CacheStorageError(
            f"cannot write {path}: {error.strerror or error}; {advice} and run the same command again"
        ) from error


class AsideFile:
    """A file being written beside its final place; `publish` puts it there, leaving the context without it undoes it.

    Raises CacheStorageError where the operating system refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._crc = 0
        self._pending = bytearray()  # the beginning of the next block
        self._flushing = 0  # how much the system was asked to write to the disk
        self._aside = path.with_name(f"{path.name}.tmp-{_HOST}-{os.getpid()}-{_TOKEN}-{next(_SERIAL)}")
        self._fd: int | None = None
        self._published = False

    def __enter__(self) -> "AsideFile":
        with storage_errors(self.path):
            make_directory(self.path.parent)
            _BEING_WRITTEN.add(self._aside)
            self._fd = os.open(self._aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if not self._published:
            with contextlib.suppress(FileNotFoundError):
                self._aside.unlink()
        _BEING_WRITTEN.discard(self._aside)

    def write(self, data: Bytes, checksum: int | None = None) -> None:
        """Append bytes; `checksum` is their CRC-32C if it is known already."""
        assert self._fd is not None
        view = memoryview(data).cast("B")
        if checksum is not None:
            self._crc = combine_crc32c(self._crc, checksum, view.nbytes)
        elif view.nbytes:
            self._crc = crc32c(view, self._crc)
        self.size += view.nbytes
        with storage_errors(self.path):
            while len(self._pending) + view.nbytes >= _WRITE_BLOCK:
                rest = _WRITE_BLOCK - len(self._pending)
                self._write_block(view[:rest])
                view = view[rest:]
            self._pending += view
            self._begin_flush()

    def finish(self, durable: bool = True) -> FileDigest:
        """Flush everything to the disk and return the digest; the file is still aside. durable: as for `write_file`."""
        assert self._fd is not None
        with storage_errors(self.path):
            if self._pending:
                self._write_block(memoryview(b""))
            if durable:
                os.fsync(self._fd)
        self._close()
        return FileDigest(self.size, f"{self._crc:08x}")

    def publish(self, durable: bool = True) -> None:
        """Move the finished file into place, replacing what was there."""
        with storage_errors(self.path):
            self._aside.replace(self.path)
            self._published = True
            if durable:
                flush_directory(self.path.parent)

    def publish_new(self) -> bool:
        """Move the finished file into place unless one is there already; say whether it was moved."""
        with storage_errors(self.path):
            try:
                os.link(self._aside, self.path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _UNSUPPORTED or self.path.exists():
                    raise
                self.publish()
                return True
            flush_directory(self.path.parent)
        return True

    def _write_block(self, end: memoryview) -> None:
        """Hand what is pending, and after it `end`, to the operating system."""
        assert self._fd is not None
        pieces = [memoryview(self._pending), end] if self._pending else [end]
        while pieces:
            written = os.writev(self._fd, pieces)
            # A disk that is nearly full or a signal lets less be written.
            while pieces and written >= pieces[0].nbytes:
                written -= pieces.pop(0).nbytes
            if written:
                pieces[0] = pieces[0][written:]
        if self._pending:
            self._pending = bytearray()

    def _begin_flush(self) -> None:
        """Let the disk begin with what was written, if that is enough; it is only a hint, which is not waited for."""
        written = self.size - len(self._pending)
        if written - self._flushing < _BEGIN_FLUSH or not hasattr(os, "posix_fadvise"):
            return
        assert self._fd is not None
        # What is not on the disk yet is not dropped from the page cache: Linux begins to write it.
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, self._flushing, written - self._flushing, os.POSIX_FADV_DONTNEED)
        self._flushing = written

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def write_file(path: Path, data: Bytes, *, durable: bool = True) -> FileDigest:
    """Write a whole small file so that it is there completely or not at all; return its digest.

    durable: survive a power cut as well. Without, which saves waiting for the disk, the file may then be torn: for what
    is checked when it is read and can be made again.
    """
    with AsideFile(path) as aside:
        aside.write(data)
        written = aside.finish(durable)
        aside.publish(durable)
    return written


def write_new_file(path: Path, data: Bytes) -> bool:
    """Write a whole small file unless there is one already; say whether it was written."""
    with AsideFile(path) as aside:
        aside.write(data)
        aside.finish()
        return aside.publish_new()


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents so that they survive a power cut."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    flush_directory(path.parent)


def refuse_linked_folders(root: Path) -> None:
    """Raise CacheCorrupt if there is a link to a directory under `root`: writing into it would change what it names."""
    for directory, folders, _ in os.walk(root):
        for path in (Path(directory, name) for name in folders):
            if path.is_symlink():
                raise CacheCorrupt(f"{path} is a link, so nothing is written here; put the directory itself there")


def flush_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Hold the directory's advisory lock, which the kernel releases when the process ends, however it ends.

    On a file system without such locks this does nothing: two builders then rely on the renames being atomic and on
    writing identical bytes.
    """
    with storage_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        yield
    finally:
        os.close(fd)


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the contents of a file of at most `limit` bytes; a larger one, or no plain file, raises CacheCorrupt."""
    # Without O_NONBLOCK, opening a named pipe that someone put here would wait for ever.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CacheCorrupt(f"{path} is not a plain file")
        with open(fd, "rb", closefd=False) as file:
            # Never asks for the whole limit: Python would allocate it. Nor for a file that is too large anyway.
            data = file.read(status.st_size + 1) if status.st_size <= limit else b""
    finally:
        os.close(fd)
    if max(len(data), status.st_size) > limit:
        raise CacheCorrupt(f"{path} is larger than the {limit} bytes such a file may have")
    return data


def digest_file(path: Path) -> FileDigest:
    """Return the digest of a file, read in blocks that stay in a CPU cache until they are checked."""
    import numpy as np

    size, checksum = 0, 0
    block = np.empty(_READ_BLOCK, dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(block.data):
            size += got
            checksum = crc32c(block[:got], checksum)
    return FileDigest(size, f"{checksum:08x}")


def is_aside(name: str) -> bool:
    """Say whether a file name is that of a file being written, or left behind by a writer that died."""
    return _ASIDE.search(name) is not None


@atexit.register
def sweep_own_files() -> None:
    """Remove what this process was writing: an exception may come before the context that would have undone it."""
    for path in list(_BEING_WRITTEN):
        if f".tmp-{_HOST}-{os.getpid()}-" in path.name:  # not those of the process this one was forked from
            with contextlib.suppress(OSError):
                path.unlink()


def sweep_aside_files(root: Path) -> list[Path]:
    """Remove the files that dead writers left aside anywhere under `root`; return their paths."""
    swept = []
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            match = _ASIDE.search(name)
            if match is not None and _is_dead(path, match):
                with contextlib.suppress(FileNotFoundError), storage_errors(path):
                    path.unlink(missing_ok=True)
                    swept.append(path)
    return swept


def _is_dead(path: Path, match: re.Match[str]) -> bool:
    if match["host"] != _HOST:
        try:
            return time.time() - path.stat().st_mtime > _FOREIGN_GRACE
        except FileNotFoundError:
            return False
    pid = int(match["pid"])
    if pid == os.getpid():
        return match["token"] != _TOKEN
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False

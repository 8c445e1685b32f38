"""What was fetched from a distance, kept on a local disk up to a bound, shared by all processes of a machine.

One sparse file for each version of each remote file: a table with the CRC-32C of every block that is there, then the
blocks at their places. A block counts once its entry in the table is written, after its data; what a crash left torn
does not match and is fetched again. Whoever reads a file holds the kernel's shared lock on it, which ends with the
process: only files without one are removed, the longest unused first, and only in a folder that bears our mark.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cache_schema.errors import CacheError
from cache_schema.storage.checksum import Bytes, crc32c
from cache_schema.storage.files import NO_SPACE, is_aside, make_directory, storage_errors, write_file
from cache_schema.storage.local import user_cache

BLOCK = 256 << 10
# What one process may have in flight: a bound below it could not hold what is being read.
LEAST = 64 << 20
_MARK, _LOCK, _USED = "dit-distill-blocks", "lock", "used"
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Blocks of remote caches; fetched again when removed.\n"
_NAME = re.compile(r"[0-9a-f]{40}")
_HEAD = b"ditblk2\n"
_THERE = 0x600D
# Blocks lie in their file as they do in the remote one behind a multiple of this, so that the page cache can hold them
# in pages as large as it holds that of a file here: behind a page of 4 kB they were read a seventh more slowly.
_ALIGNMENT = 2 << 20
_GRANT = 16 << 20  # bytes that a process counts as used before it has written them, of a large store
_SHOW_USE = 60.0  # seconds between notes that a file is in use
_FAR = ("nfs", "cifs", "smb", "fuse.sshfs", "lustre", "beegfs", "gpfs", "ceph", "9p")


def default_folder() -> Path:
    """Return where blocks are kept: $DIT_CACHE_LOCAL, or the user's cache directory."""
    chosen = os.environ.get("DIT_CACHE_LOCAL")
    if chosen:
        return Path(chosen)
    return user_cache("blocks")


class BlockStore:
    """A marked folder of blocks, of at most `bound` bytes; raises CacheError for a folder or bound that will not do."""

    def __init__(self, root: Path, bound: int, least: int = LEAST) -> None:
        if bound < least:
            raise CacheError(
                f"a local cache of {bound / 1e6:.0f} MB is less than the {least / 1e6:.0f} MB that are in flight at "
                "once; allow more"
            )
        self.root, self.bound = root, bound
        self.fetched = 0  # blocks that this process had to ask for
        self._begin()
        with storage_errors(root):
            make_directory(root)
        _refuse_foreign(root)
        for name, text in ((_MARK, b"1\n"), ("CACHEDIR.TAG", _TAG)):
            if not (root / name).exists():
                write_file(root / name, text)

    def file(self, url: str, version: str, size: int) -> "BlockFile":
        """Return the blocks of one version of a remote file of `size` bytes."""
        key = hashlib.sha256(_HEAD + f"{url}\0{version}\0{size}".encode()).hexdigest()[:40]
        return BlockFile(self, self.root / key[:2] / key, size)

    def _begin(self) -> None:
        self._process, self._threads, self._granted = os.getpid(), threading.Lock(), 0

    def reserve(self, size: int) -> bool:
        """Say whether there is room for `size` more bytes, which then count as used."""
        if self._process != os.getpid():
            # What was granted is the parent's, and a thread of it may have held the lock at the fork.
            self._begin()
        with self._threads:
            if self._granted < size:
                self._granted += self._grant(size - self._granted)
            if self._granted < size:
                return False
            self._granted -= size
        return True

    def _grant(self, least: int) -> int:
        """Return for how many bytes more there is room, and count them: a few blocks' at once, 0 for less than that."""
        fd = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            size = max(least, min(_GRANT, self.bound // 64))
            used = self._counted()
            if used is None or used + size > self.bound:
                used = self._make_room(size)
            size = size if used + size <= self.bound else least
            granted = size if used + size <= self.bound else 0
            (self.root / _USED).write_text(str(used + granted))
            return granted
        finally:
            os.close(fd)

    def _counted(self) -> int | None:
        # A crash leaves it too large, by what was granted and not written: it is counted again when the bound is met.
        try:
            return int((self.root / _USED).read_text())
        except (OSError, ValueError):
            return None

    def _make_room(self, size: int) -> int:
        """Remove the longest unused files nobody reads until `size` more bytes fit; return how many are used then."""
        found = []
        for path in self.files():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_blocks * 512, path))
        used = sum(taken for _, taken, _ in found)
        # A little more than is needed, so that not every block is a look at all files; and what others were granted and
        # have not written yet is not seen here.
        goal = self.bound - size - min(self.bound // 10, LEAST)
        for _, taken, path in sorted(found):
            if used <= max(goal, 0):
                break
            if _remove_unused(path):
                used -= taken
        return used

    def files(self) -> Iterator[Path]:
        """Yield the files of blocks, and nothing else that may lie in the folder."""
        for folder in self.root.iterdir():
            if len(folder.name) == 2 and not folder.is_symlink() and folder.is_dir():
                yield from (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and not path.is_symlink())


class NoRoom(Exception):  # noqa: N818 -- reads as what happened
    """The disk is too full for the blocks of one more file."""


class _Opened:
    """An open file of blocks, and the numbers of those in it that this process has seen: they do not change any more.

    One that was removed meanwhile goes on holding them for whoever still reads it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seen: set[int] = set()

    def __del__(self) -> None:
        os.close(self.fd)


class BlockFile:
    """The blocks of one remote file that are here. To be used by one process, by any number of its threads."""

    def __init__(self, store: BlockStore, path: Path, size: int) -> None:
        self._store, self._path, self._size = store, path, size
        self._count = -(-size // BLOCK)
        table = len(_HEAD) + 8 * self._count
        self._data = -(-table // _ALIGNMENT) * _ALIGNMENT
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        self._leases, self._shown = 0, 0.0

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Keep the blocks from being removed while they are read; the other methods want one, but for `read_seen`."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def acquire(self) -> None:
        """Begin a lease, which `release` ends; raises NoRoom."""
        with self._lock:
            if not self._leases:
                self._open_locked()
            self._leases += 1

    def release(self) -> None:
        """End a lease."""
        with self._lock:
            self._leases -= 1
            if not self._leases:
                fcntl.flock(self._file.fd, fcntl.LOCK_UN)

    def has(self, number: int) -> bool:
        """Say whether a block is here; one that this process has not seen yet is held against its checksum."""
        file = self._file
        if number in file.seen:
            return True
        entry = os.pread(file.fd, 8, len(_HEAD) + 8 * number)
        if int.from_bytes(entry[4:], "little") != _THERE:
            return False
        start = number * BLOCK
        data = os.pread(file.fd, min(BLOCK, self._size - start), self._data + start)
        if crc32c(data) != int.from_bytes(entry[:4], "little"):
            return False
        file.seen.add(number)
        return True

    def has_seen(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Say whether this process knows that all blocks of every (offset, size) are here."""
        seen = self._file.seen
        if len(seen) == self._count:
            return True
        return all(seen.issuperset(blocks_of(offset, size)) for offset, size in ranges if size)

    def read_into(self, view: memoryview, offset: int) -> bool:
        """Fill `view` from blocks that are here; False where the disk has fewer bytes."""
        return os.preadv(self._file.fd, [view], self._data + offset) == view.nbytes

    def read_seen(self, view: memoryview, offset: int) -> bool:
        """Fill `view` if this process knows all blocks of it to be here; say whether it did."""
        file, size = self._opened, view.nbytes
        if file is None or not (len(file.seen) == self._count or file.seen.issuperset(blocks_of(offset, size))):
            return False
        return os.preadv(file.fd, [view], self._data + offset) == size

    def put(self, blocks: Mapping[int, Bytes]) -> None:
        """Keep blocks, if there is room for them; a disk that is full is as if there were none."""
        size, file = sum(len(data) for data in blocks.values()), self._file
        with contextlib.suppress(OSError):
            if not self._store.reserve(size):
                return
            for number, data in blocks.items():
                os.pwrite(file.fd, data, self._data + number * BLOCK)
                entry = crc32c(data).to_bytes(4, "little") + _THERE.to_bytes(4, "little")
                os.pwrite(file.fd, entry, len(_HEAD) + 8 * number)
                file.seen.add(number)

    def forget(self) -> None:
        """Take all blocks for missing: what was fetched is not what it should be."""
        with self.lease():
            os.pwrite(self._file.fd, bytes(8 * self._count), len(_HEAD))
            self._file.seen.clear()

    @property
    def _file(self) -> _Opened:
        assert self._opened is not None
        return self._opened

    def _open_locked(self) -> None:
        while True:
            if self._opened is None:
                self._opened = self._open()
            fcntl.flock(self._opened.fd, fcntl.LOCK_SH)
            if os.fstat(self._opened.fd).st_nlink:
                break
            self._opened = None  # it was removed before the lock was ours
        now = time.monotonic()
        if now - self._shown > _SHOW_USE or not self._shown:
            self._shown = now
            os.utime(self._opened.fd)

    def _open(self) -> _Opened:
        with storage_errors(self._path):
            try:
                self._path.parent.mkdir(exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                file = _Opened(os.open(self._path, flags, 0o644))
                if os.pread(file.fd, len(_HEAD), 0) != _HEAD:
                    os.ftruncate(file.fd, self._data + self._size)
                    os.pwrite(file.fd, _HEAD, 0)
                return file
            except OSError as error:
                if error.errno in NO_SPACE:
                    raise NoRoom from error
                raise


def blocks_of(offset: int, size: int) -> range:
    """Return the numbers of the blocks that a range has a part in."""
    return range(offset // BLOCK, -(-(offset + size) // BLOCK))


def _remove_unused(path: Path) -> bool:
    """Remove a file of blocks unless a process reads it; say whether it was removed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _refuse_foreign(root: Path) -> None:
    # Another process may be making the same folder: its mark is there first of all, so it is looked for last.
    if any(not is_aside(path.name) for path in root.iterdir()) and not (root / _MARK).is_file():
        raise CacheError(f"{root} holds other things than a local cache; name an empty folder (DIT_CACHE_LOCAL)")
    kind = _file_system(root)
    if kind.startswith(_FAR):
        raise CacheError(
            f"{root} is on {kind}, where processes of a machine cannot rely on locks; name a folder on a local disk "
            "(DIT_CACHE_LOCAL)"
        )


def _file_system(path: Path) -> str:
    """Return the kind of the file system of a folder, as Linux calls it; nothing elsewhere."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    resolved = path.resolve()
    over = [(len(mount[1]), mount[2]) for mount in mounts if resolved.is_relative_to(mount[1].replace("\\040", " "))]
    return max(over, default=(0, ""))[1]

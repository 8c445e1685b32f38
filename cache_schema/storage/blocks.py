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
from collections.abc import Iterator, Mapping
from pathlib import Path

from cache_schema.errors import CacheError
from cache_schema.storage.checksum import Bytes, crc32c
from cache_schema.storage.files import make_directory, storage_errors, write_file
from cache_schema.storage.local import user_cache

BLOCK = 256 << 10
# What one process may have in flight: a bound below it could not hold what is being read.
LEAST = 64 << 20
_MARK, _LOCK, _USED = "dit-distill-blocks", "lock", "used"
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Blocks of remote caches; fetched again when removed.\n"
_NAME = re.compile(r"[0-9a-f]{40}")
_HEAD = b"ditblk1\n"
_THERE = 0x600D
_PAGE = 4096
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
        key = hashlib.sha256(f"{url}\0{version}\0{size}".encode()).hexdigest()[:40]
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


class BlockFile:
    """The blocks of one remote file that are here. To be used by one process, by any number of its threads."""

    def __init__(self, store: BlockStore, path: Path, size: int) -> None:
        self._store, self._path, self._size = store, path, size
        self._count = -(-size // BLOCK)
        table = len(_HEAD) + 8 * self._count
        self._data = -(-table // _PAGE) * _PAGE
        self._lock = threading.Lock()
        self._fd, self._leases, self._shown = -1, 0, 0.0
        self._checked: set[int] = set()

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Keep the blocks from being removed while they are read."""
        with self._lock:
            if self._leases == 0:
                self._acquire()
            self._leases += 1
        try:
            yield
        finally:
            with self._lock:
                self._leases -= 1
                if self._leases == 0:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)

    def has(self, number: int) -> bool:
        """Say whether a block is here; one that this process has not seen yet is held against its checksum."""
        if number in self._checked:
            return True
        entry = os.pread(self._fd, 8, len(_HEAD) + 8 * number)
        if int.from_bytes(entry[4:], "little") != _THERE:
            return False
        start = number * BLOCK
        data = os.pread(self._fd, min(BLOCK, self._size - start), self._data + start)
        if crc32c(data) != int.from_bytes(entry[:4], "little"):
            return False
        self._checked.add(number)
        return True

    def read_into(self, view: memoryview, offset: int) -> bool:
        """Fill `view` from blocks that are here; False where the disk has fewer bytes."""
        return os.preadv(self._fd, [view], self._data + offset) == view.nbytes

    def put(self, blocks: Mapping[int, Bytes]) -> None:
        """Keep blocks, if there is room for them; a disk that is full is as if there were none."""
        size = sum(len(data) for data in blocks.values())
        with contextlib.suppress(OSError):
            if not self._store.reserve(size):
                return
            for number, data in blocks.items():
                os.pwrite(self._fd, data, self._data + number * BLOCK)
                entry = crc32c(data).to_bytes(4, "little") + _THERE.to_bytes(4, "little")
                os.pwrite(self._fd, entry, len(_HEAD) + 8 * number)
                self._checked.add(number)

    def forget(self) -> None:
        """Take all blocks for missing: what was fetched is not what it should be."""
        with self.lease():
            os.pwrite(self._fd, bytes(8 * self._count), len(_HEAD))
            self._checked.clear()

    def _acquire(self) -> None:
        while True:
            if self._fd < 0:
                self._open()
            fcntl.flock(self._fd, fcntl.LOCK_SH)
            if os.fstat(self._fd).st_nlink:
                break
            # It was removed before the lock was ours.
            os.close(self._fd)
            self._fd = -1
        now = time.monotonic()
        if now - self._shown > _SHOW_USE or not self._shown:
            self._shown = now
            os.utime(self._fd)

    def _open(self) -> None:
        self._checked.clear()
        with storage_errors(self._path):
            self._path.parent.mkdir(exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._path, flags, 0o644)
            if os.pread(self._fd, len(_HEAD), 0) != _HEAD:
                os.ftruncate(self._fd, self._data + self._size)
                os.pwrite(self._fd, _HEAD, 0)


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
    if not (root / _MARK).is_file() and any(root.iterdir()):
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

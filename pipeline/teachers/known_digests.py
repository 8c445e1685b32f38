"""Digests of large files that this user's machine has computed before: 24 GB are read once, not by every process.

What is known of a file is known of these very bytes on disk: of its device and inode with their size and the times of
their last change, to the nanosecond. The time of change of an inode (ctime) is the kernel's and cannot be set, so no
other contents pass for it. Where the times leave a doubt, nothing is remembered.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from cache_schema.storage.local import user_cache

WORTH = 64 << 20  # bytes: smaller files are read faster than anything is looked up
_SETTLED = 3.0  # seconds since the last change: coarse clocks give two changes the same time


def known_digest(path: Path, compute: Callable[[Path], str]) -> str:
    """What `compute` makes of a file, remembered; of processes that ask at once, one computes and the others wait.

    Without a folder that can be written to (`XDG_CACHE_HOME`, by default ~/.cache), every process computes it.
    """
    if path.stat().st_size < WORTH:
        return compute(path)
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:40]
        fd = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return compute(path)
    try:
        with contextlib.suppress(OSError):  # a disk on which nothing can be locked: several may compute the same
            fcntl.flock(fd, fcntl.LOCK_EX)
        before = _state(path)
        known = _read(fd)
        if known is not None and known[0] == before:
            return known[1]
        digest = compute(path)
        if _state(path) == before and _is_settled(path):
            with contextlib.suppress(OSError):
                _write(fd, before, digest)
        return digest
    finally:
        os.close(fd)


def _folder() -> Path:
    return user_cache("digests")


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _is_settled(path: Path) -> bool:
    found = path.stat()
    return max(found.st_mtime, found.st_ctime) < time.time() - _SETTLED


def _read(fd: int) -> tuple[list[int], str] | None:
    """The state and the digest that were remembered; None where there are none, or half of them."""
    try:
        found = json.loads(os.pread(fd, 4096, 0))
        return list(found["state"]), str(found["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(fd: int, state: list[int], digest: str) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"state": state, "digest": digest}).encode(), 0)

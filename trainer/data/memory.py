"""How much main memory there is to use, and memory that worker processes share."""

from __future__ import annotations

import mmap
import os
import weakref
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import numpy as np

from cache_schema.loading.slots import nameless_file
from cache_schema.memory import available_memory
from trainer.processes import beside

_SHARE = 4  # of the memory that is free, a quarter


def spare_memory() -> int:
    """Bytes that decoded images may take unless told otherwise: a share of what is free, here or in this container."""
    return min(available_memory(), _left_in_container()) // _SHARE // beside()


class SharedBytes:
    """Zeroed uint8 memory that worker processes share, forked or started; nameless, for containers lack /dev/shm."""

    def __init__(self, size: int):
        self._map(nameless_file(max(1, size)), size)

    def _map(self, fd: int, size: int) -> None:
        self._fd, self._size = fd, size
        weakref.finalize(self, os.close, fd)
        self.array = np.frombuffer(mmap.mmap(fd, max(1, size)), dtype=np.uint8)[:size]

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return _copied, (self.array.tobytes(),)
        return _attached, (reduction.DupFd(self._fd), self._size)


def _copied(content: bytes) -> SharedBytes:
    shared = SharedBytes(len(content))
    shared.array[:] = np.frombuffer(content, dtype=np.uint8)
    return shared


def _attached(handle: Any, size: int) -> SharedBytes:
    shared = SharedBytes.__new__(SharedBytes)
    shared._map(handle.detach(), size)
    return shared


def _left_in_container(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What a limit of cgroups leaves, version 2 or 1; no bound where there is none."""
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int((cgroup / most).read_text()) - int((cgroup / used).read_text()))
        except (OSError, ValueError):
            continue  # not of this version, or "max"
    return 1 << 62

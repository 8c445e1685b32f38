"""How much main memory there is to use, and memory that worker processes share."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

import numpy as np

_SHARE = 4  # of the memory that is free, a quarter


def spare_memory() -> int:
    """Bytes that decoded images may take unless told otherwise: a share of what is free, here or in this container."""
    return min(_available(), _left_in_container()) // _SHARE


def shared_bytes(*shape: int) -> np.ndarray:
    """Zeroed uint8 memory shared with forked processes; anonymous, for containers often lack /dev/shm."""
    return np.frombuffer(mmap.mmap(-1, max(1, math.prod(shape))), dtype=np.uint8)[: math.prod(shape)].reshape(shape)


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError):
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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

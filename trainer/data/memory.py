"""How much main memory there is to use, and memory that worker processes share."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np

from cache_schema.memory import available_memory

_SHARE = 4  # of the memory that is free, a quarter


def spare_memory() -> int:
    """Bytes that decoded images may take unless told otherwise: a share of what is free, here or in this container."""
    return min(available_memory(), _left_in_container()) // _SHARE


def shared_bytes(*shape: int) -> np.ndarray:
    """Zeroed uint8 memory shared with forked processes; anonymous, for containers often lack /dev/shm."""
    return np.frombuffer(mmap.mmap(-1, max(1, math.prod(shape))), dtype=np.uint8)[: math.prod(shape)].reshape(shape)


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

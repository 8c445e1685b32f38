"""Memory for batches."""

import math
import mmap

import numpy as np
import torch

from cache_schema.errors import CacheRequestError

# Beyond this, the C library asks the kernel for fresh memory every time. Filling it page by page (4 KB) takes four
# times as long as reading the bytes that go there; by huge pages it does not.
_HUGE_FROM = 32 << 20
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised CPU tensor, in huge pages where it is large and the system has them.

    Raises CacheRequestError where there is no memory for it.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _HUGE_FROM or _MADV_HUGEPAGE is None:
        return _ordinary(shape, dtype)
    try:
        memory = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(_MADV_HUGEPAGE)
    except OSError:
        # No huge pages in this kernel, or no memory at all.
        return _ordinary(shape, dtype)
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -whole.ctypes.data % _HUGE_PAGE
    return torch.from_numpy(whole[start : start + nbytes]).view(dtype).view(shape)


def _ordinary(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        raise CacheRequestError(f"there is no memory for a batch {shape} of {dtype}; ask for less") from error

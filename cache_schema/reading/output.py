"""The memory that a batch is read into: fresh, or what the caller brings."""

from typing import Any

import numpy as np
import torch

from cache_schema.errors import CacheRequestError
from cache_schema.storage.buffers import empty

Buffer = torch.Tensor | np.ndarray[Any, np.dtype[Any]]

# NumPy has neither bfloat16 nor float8: their bits travel as unsigned integers.
_NUMPY_BITS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


def output(out: Buffer | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return `out` as a tensor, or a new one where there is none; raises CacheRequestError if it does not fit."""
    if out is None:
        return empty(shape, dtype)
    if isinstance(out, np.ndarray):
        if not out.flags.writeable:
            raise CacheRequestError("out is read-only")
        tensor = torch.from_numpy(out)
        tensor = tensor.view(dtype) if tensor.dtype == _NUMPY_BITS.get(dtype) else tensor
    else:
        tensor = out
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CacheRequestError(f"out is {tuple(tensor.shape)} {tensor.dtype}, the batch is {shape} {dtype}")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise CacheRequestError("out must be contiguous and in CPU memory")
    return tensor

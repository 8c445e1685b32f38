"""Decoding in one pass over memory on a GPU, by a kernel that PyTorch compiles."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

Decode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
# What compiling raises where no compiler works: of PyTorch, of Triton that is not there, of programs that are not.
_BROKEN = (RuntimeError, ImportError, OSError)
_off = False  # once it failed


def scale_tokens(payload: torch.Tensor, scale: torch.Tensor, channel: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """payload (B, T, L, C) by scale (B, T, L) and channel (T, C) or (B, T, C), in float32, rounded once to `dtype`."""
    return (payload.to(torch.float32) * scale[..., None] * channel.unsqueeze(-2)).to(dtype)


def scale_in_one_pass(
    payload: torch.Tensor, scale: torch.Tensor, channel: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """`scale_tokens` as one kernel, or None where there is no GPU or nothing to compile with; that is said once.

    The first call of a process compiles, which takes seconds.
    """
    global _off
    compiled = None if _off or payload.device.type != "cuda" else _compiled()
    if compiled is None:
        return None
    try:
        with torch.no_grad():
            return compiled(payload, scale, channel, dtype)
    except torch.OutOfMemoryError:
        raise
    except _BROKEN as error:
        _off = True
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"features are decoded in several passes, for no kernel can be compiled: {reason}", stacklevel=2)
        return None


@functools.cache
def _compiled() -> Decode | None:
    from torch.utils._triton import has_triton

    return torch.compile(scale_tokens) if torch.cuda.is_available() and has_triton() else None

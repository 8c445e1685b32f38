"""Where a run computes, and in which precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

from cache_schema.devices import choose_device, use_device

__all__ = [
    "Precision",
    "autocast",
    "choose_device",
    "full_precision",
    "resumes_exactly",
    "set_deterministic",
    "use_device",
]

Precision = Literal["auto", "float32", "bfloat16"]


def autocast(device: torch.device, precision: Precision = "auto") -> AbstractContextManager[Any]:
    """The forward pass in bf16 or float32, over float32 weights.

    auto: bf16 on an accelerator, and on a CPU whose instructions multiply bf16 themselves (elsewhere it is emulated
    and slower than float32).
    """
    fast = device.type != "cpu" or _multiplies_bfloat16()
    wanted = fast if precision == "auto" else precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 in earnest, whatever surrounds it: neither bf16 nor, in convolutions on a GPU, TF32.

    For scores, which must not depend on the machine that computes them: of two neighbours whose distances differ in the
    third digit, another is the nearer one in bf16.
    """
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions


def set_deterministic(wanted: bool) -> None:
    """Have PyTorch use only algorithms that give the same bits each time, or any; before the first of them runs."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # Else PyTorch also writes NaN over all memory it hands out, to show who reads it too early.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def resumes_exactly(device: torch.device, deterministic: bool) -> bool:
    """Whether a run that was interrupted ends with the same bits: sums on a GPU depend on the order of its threads."""
    return device.type == "cpu" or deterministic


def _multiplies_bfloat16() -> bool:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))

"""Where a run computes, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from cache_schema.devices import choose_device, use_device

__all__ = ["Precision", "autocast", "choose_device", "use_device"]

Precision = Literal["auto", "float32", "bfloat16"]


def autocast(device: torch.device, precision: Precision = "auto") -> AbstractContextManager[Any]:
    """The forward pass in bf16 or float32, over float32 weights.

    auto: bf16 on an accelerator, and on a CPU whose instructions multiply bf16 themselves (elsewhere it is emulated
    and slower than float32).
    """
    fast = device.type != "cpu" or _multiplies_bfloat16()
    wanted = fast if precision == "auto" else precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def _multiplies_bfloat16() -> bool:
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))

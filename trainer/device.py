"""Where a run computes, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from trainer.errors import TrainError

Precision = Literal["auto", "float32", "bfloat16"]


def choose_device(name: str) -> torch.device:
    """The device called `name`, or the accelerator if there is one for "auto"; raises TrainError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainError(f"device {name!r}: no such device; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrainError(f"device {name!r}: torch sees no GPU here; use --device cpu")
    return device


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

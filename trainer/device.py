"""Where a run computes, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from trainer.errors import TrainError


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


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on an accelerator, plain float32 on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")

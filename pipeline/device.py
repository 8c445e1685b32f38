"""Where models run and in which precision: what `auto` means on this machine."""

import os
from typing import TYPE_CHECKING, Literal

from cache_schema.errors import DitDistillError

if TYPE_CHECKING:
    import torch

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def choose_device(device: str) -> "torch.device":
    """The device that --device names; raises DitDistillError if there is none such."""
    import torch

    try:
        target = torch.device(
            "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        )
    except RuntimeError:
        raise DitDistillError(f"--device {device}: not a device; use auto, cpu or cuda") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DitDistillError(f"--device {device}: this machine has no CUDA GPU that PyTorch can use")
    if target.type == "cuda" and target.index is None:
        # One process per GPU, where accelerate or torchrun started several.
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return target


def choose_dtype(dtype: DtypeName, device: "torch.device") -> "torch.dtype":
    """The precision that --dtype names on this device."""
    import torch

    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)

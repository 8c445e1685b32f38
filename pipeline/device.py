"""In which precision models run: what `auto` means on this machine. Devices are those of `cache_schema.devices`."""

from typing import TYPE_CHECKING, Literal

from cache_schema.devices import choose_device

if TYPE_CHECKING:
    import torch

__all__ = ["DtypeName", "choose_device", "choose_dtype"]

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def choose_dtype(dtype: DtypeName, device: "torch.device") -> "torch.dtype":
    """The precision that --dtype names on this device."""
    import torch

    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype)

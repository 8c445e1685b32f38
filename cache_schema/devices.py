"""Which device a command runs on, and what to say where there is none such: the rules of both commands."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cache_schema.errors import DitDistillError

if TYPE_CHECKING:
    import torch

_NODES = Path("/dev")  # where the kernel's driver shows NVIDIA's GPUs
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_KEPT = 1 << 30  # bytes at the end of the heap that are not given back


class DeviceError(DitDistillError):
    """There is no such device, or it cannot be used; the message says what there is."""


def choose_device(name: str) -> torch.device:
    """The device called `name`; auto: a CUDA GPU where there is one, else the CPU.

    Of several GPUs a process that torchrun or accelerate started takes the one of its rank, counted again from the
    first where there are more processes than GPUs. Raises DeviceError for a device that does not exist, and for auto on
    a machine with an NVIDIA GPU that PyTorch cannot use: hours on a CPU should be somebody's wish.
    """
    import torch

    if name == "auto":
        if _gpus():
            return _of_rank()
        if (node := _gpu_node()) is not None:
            raise DeviceError(
                f"this machine has an NVIDIA GPU ({node}) that PyTorch cannot use: {_why_not()}; mend that, or use "
                "--device cpu"
            )
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device {name!r}: no such device; use auto, cpu or cuda") from None
    if device.type == "cuda":
        return _existing_gpu(device)
    available: Callable[[], bool] = getattr(getattr(torch, device.type, None), "is_available", bool)
    if (device.type != "cpu" and not available()) or (device.type == "cpu" and device.index):
        raise DeviceError(f"device {name!r}: there is none here; use auto, cpu or cuda")
    return device


def use_device(device: torch.device) -> str:
    """Make a GPU the one that CUDA means where none is named, and return the device in words, to be shown.

    On a CPU memory that is freed is kept from here on, see `keep_freed_memory`.
    """
    import torch

    if device.type == "cpu":
        keep_freed_memory()
    if device.type != "cuda":
        return f"device {device}"
    torch.cuda.set_device(device)
    found = torch.cuda.get_device_properties(device)
    return f"device {device}: {found.name}, {found.total_memory / 1e9:.0f} GB"


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 itself, in oneDNN too; elsewhere it is emulated and slower than float32."""
    import torch

    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    used = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    return used and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


@contextmanager
def sound_gradients() -> Iterator[None]:
    """Attention without cuDNN's kernels, which PyTorch prefers on an H100 or H200 and whose backward pass is wrong.

    Gradients became NaN in half of a LoRA's tensors at the first step, and at FLUX.1's size memory was read that is not
    the process's own (H200, PyTorch 2.11); the forward pass is right. To be held around all of a training: activations
    that are recomputed run attention again in the backward pass. Without effect on a CPU. Source:
    https://github.com/pytorch/pytorch/issues/196678.
    """
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def keep_freed_memory(largest: int = 1 << 27) -> None:
    """Have malloc keep what one batch has freed for the next one, which asks for blocks of the same sizes again.

    By default glibc gives every block beyond 32 MB back to the system, and smaller ones now and then, which fills each
    new one with zeros, page by page: to decode a batch of wide features took 22 ms and takes 5, and half of the time in
    which `dit-train embed` kept the cores busy was the kernel's. Nothing is done where malloc is another library's.
    largest: bytes of a block; what is larger is still given back at once.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, largest)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def prepare_memory() -> None:
    """Let CUDA's memory grow in pieces, which leaves fewer holes; before PyTorch is imported.

    Passes that are halved, and shapes that change with the batch, otherwise end with free memory that fits nothing.
    What the user has set stays.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not sys.platform.startswith("linux") or os.environ.keys() & set(names):
        return
    os.environ[names[0] if _torch_version() >= (2, 9) else names[1]] = "expandable_segments:True"


def _torch_version() -> tuple[int, ...]:
    from importlib import metadata

    try:
        return tuple(int(part) for part in metadata.version("torch").split(".")[:2])
    except (metadata.PackageNotFoundError, ValueError):
        return (0,)


def _gpus() -> int:
    """How many GPUs PyTorch can use."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say is said in the error
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _of_rank() -> torch.device:
    import torch

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % _gpus())


def _existing_gpu(device: torch.device) -> torch.device:
    count = _gpus()
    if not count:
        raise DeviceError(f"device {str(device)!r}: this machine has no CUDA GPU that PyTorch can use: {_why_not()}")
    if device.index is None:
        return _of_rank()
    if device.index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise DeviceError(f"device {str(device)!r}: there is none such, only {there}")
    return device


def _gpu_node() -> Path | None:
    """The device file of an NVIDIA GPU, unless the user hides them all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None
    return min(_NODES.glob("nvidia[0-9]*"), default=None)


def _why_not() -> str:
    """Why CUDA does not start, in PyTorch's words."""
    import torch

    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return "CUDA finds no device"

"""Weights that stay in main memory: blocks of a transformer are copied to the device to run, the next one meanwhile.

diffusers' group offloading does the copying. What is added here: memory that a GPU can copy from by itself, and passes
that end at a tap, which diffusers does not know of.
"""

import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING, _LAYER_EXECUTION_TRACKER
from torch.nn import Module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_ALIGNMENT = 64  # bytes, a cache line
_PORTABLE = 1  # of cudaHostRegister: whatever the device


def offload_transformer(transformer: Any, blocks: Sequence[Module], device: torch.device) -> None:
    """Keep a diffusers model in main memory; each of its blocks is copied to the device to run, and released again.

    On CUDA the next block is copied while one runs, on a stream of its own, from page-locked memory: two blocks are on
    the device, and nothing is copied back. Not so for weights of 8 bits, which are no plain tensors to lay into
    such memory, and where the system locks none.
    """
    streams = device.type == "cuda" and _is_plain(transformer) and _lock_pages(blocks, device)
    transformer.enable_group_offload(
        onload_device=device,
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=streams,
        low_cpu_mem_usage=streams,  # no second copy of the weights: they are page-locked where they are
    )


def offload_text_encoder(encoder: Module, device: torch.device) -> None:
    """Keep a text encoder in main memory; each of its layers is copied to the device to run, and released again.

    Without streams: its layers are many and small, some of them share their weights, and it runs before the long part.
    """
    apply_group_offloading(encoder, onload_device=device, offload_type="leaf_level")


def order_is_known(blocks: Sequence[Module]) -> bool:
    """Whether a pass may end before the last block: diffusers has to see one whole pass to know what to fetch next."""
    return not any(_hook(block, _LAYER_EXECUTION_TRACKER) for block in blocks)


def put_back(blocks: Sequence[Module]) -> None:
    """Release what a pass left on the device of blocks that are fetched ahead: where it ended, and the one behind.

    Nothing is copied: the weights are in main memory all the time.
    """
    for block in blocks:
        hook = _hook(block, _GROUP_OFFLOADING)
        if hook is not None and hook.group.stream is not None:
            hook.group.offload_()


def _hook(block: Any, name: str) -> Any:
    registry = getattr(block, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)


def _is_plain(module: Module) -> bool:
    return not any(is_traceable_wrapper_subclass(parameter) for parameter in module.parameters())


def _lock_pages(blocks: Sequence[Module], device: torch.device) -> bool:
    """Move the weights of blocks, one block after the other, to page-locked memory; False where there is none to have.

    PyTorch's own `pin_memory` would make a copy of all of them first, each rounded up to a power of two.
    """
    runtime = torch.cuda.cudart()
    for block in blocks:
        if not _move_to_locked(block, runtime):
            try:  # what refused is reported once more, by whatever is asked of CUDA next
                torch.cuda.synchronize(device)
                torch.zeros(1, device=device)
            except RuntimeError:
                pass
            return False
    return True


def _move_to_locked(block: Module, runtime: Any) -> bool:
    """Lay the parameters and buffers of a block side by side into memory that is page-locked as long as one of them."""
    tensors = [*block.parameters(), *block.buffers()]
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    memory = np.frombuffer(mmap.mmap(-1, max(1, sum(sizes))), dtype=np.uint8)
    address = memory.ctypes.data
    if int(runtime.cudaHostRegister(address, memory.nbytes, _PORTABLE)) != 0:
        return False
    weakref.finalize(memory, _unlock, runtime, address, os.getpid())
    start, whole = 0, torch.from_numpy(memory)
    for tensor, size in zip(tensors, sizes, strict=True):
        place = whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.data)
        start += size
    return True


def _unlock(runtime: Any, address: int, process: int) -> None:
    if os.getpid() == process:
        runtime.cudaHostUnregister(address)

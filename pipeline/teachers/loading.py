"""How a transformer is held: 8-bit weights, blocks in main memory until they run, compiled blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import Module

from pipeline.teachers.base import Quantization, TeacherError


@dataclass(frozen=True)
class Loading:
    """quantization: format of the weights of linear layers, None as they were saved.

    offload: text encoders and transformer stay in main memory, and each block is on the device only while it runs, see
    `pipeline.teachers.offloading`.
    compile: the blocks of the transformer are compiled when they first run.
    """

    quantization: Quantization | None = None
    offload: bool = False
    compile: bool = False

    def check(self, device: torch.device) -> None:
        """Raise TeacherError, before anything is loaded, for what this device or this machine cannot do."""
        if self.offload and device.type == "cpu":
            raise TeacherError("--offload keeps weights in main memory, where they are on a CPU anyway; leave it out")
        if self.compile:
            _check_compiler(device)


PLAIN = Loading()


def compile_blocks(blocks: Sequence[Module]) -> None:
    """Compile what each block computes, as diffusers' `compile_repeated_blocks` does, and for every family.

    Hooks stay outside, so that a tap can be read at any block at any time, and the pass be left there.
    """
    for block in blocks:
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise TeacherError("--compile needs Triton on a GPU, and it is not installed; leave --compile out")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise TeacherError("--compile needs a C++ compiler, and none was found; install g++, or leave it out") from None

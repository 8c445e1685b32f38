"""Where a run computes, and in which precision."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cache_schema.devices import choose_device, multiplies_bfloat16, use_device
from trainer.processes import be_one_of, beside

__all__ = [
    "Precision",
    "autocast",
    "choose_device",
    "choose_workers",
    "decide_precision",
    "feature_dtype",
    "full_precision",
    "peak_memory",
    "resumes_exactly",
    "set_deterministic",
    "share_machine",
    "usable_cores",
    "use_device",
    "watch_memory",
]

Precision = Literal["auto", "float32", "bfloat16"]
_WORKERS = 8  # that load, at most


def autocast(device: torch.device, precision: Precision, network: nn.Module) -> AbstractContextManager[Any]:
    """The forward pass of a network in bf16 or float32, over float32 weights; `decide_precision` says what auto is."""
    wanted = decide_precision(precision, device, network)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted == "bfloat16")


def decide_precision(wanted: Precision, device: torch.device, network: nn.Module) -> Precision:
    """What "auto" stands for: bf16 on an accelerator, and on a CPU where it is not slower for any such network.

    That is a CPU which multiplies bf16 itself, in oneDNN too (elsewhere it is emulated, 2 to 13 times slower than
    float32), and a network whose only convolutions cut the image into patches. For other convolutions bf16 was
    measured from twice as fast to 25 times slower, by machine and by kind. It is decided by what is there and never
    by a stopwatch, which would make another student of the same config on a busy machine.
    """
    if wanted != "auto":
        return wanted
    fast = device.type != "cpu" or (multiplies_bfloat16() and not _convolves(network))
    return "bfloat16" if fast else "float32"


def feature_dtype(precision: Precision, device: torch.device, network: nn.Module) -> torch.dtype:
    """The type that features are decoded to where the forward pass of a network reads them."""
    return torch.bfloat16 if decide_precision(precision, device, network) == "bfloat16" else torch.float32


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


def choose_workers(wanted: int | Literal["auto"], device: torch.device) -> int:
    """How many processes load batches. auto: half of the cores, at most 8, where a GPU would have to wait for one
    thread; none on a CPU, where they would take the cores from the training, and one thread loads instead.
    """
    if wanted != "auto":
        return wanted
    return 0 if device.type == "cpu" else max(1, min(_WORKERS, usable_cores() // (2 * beside())))


def share_machine(runs: int) -> None:
    """Have this process, one of several runs that are made side by side here, take its share of cores and memory."""
    be_one_of(runs)
    torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores() // runs)))


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processor cores that this process may use: those it is bound to, or as many as its container may keep busy."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, _container_cores(cgroup)))


def _container_cores(cgroup: Path) -> int:
    """What a limit of cgroups on processor time amounts to, version 2 or 1; no bound where there is none."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / file).read_text() for file in files).split()
            if int(quota) > 0:
                return max(1, int(quota) // int(period))
        except (OSError, ValueError):
            continue  # not of this version, or "max"
    return 1 << 16


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at once: on a GPU since `watch_memory`, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def watch_memory(device: torch.device) -> None:
    """Have `peak_memory` tell of what comes from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


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


def _convolves(network: nn.Module) -> bool:
    """Whether there are convolutions but those of patches, which are matrix products."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kinds) and module.kernel_size != module.stride for module in network.modules())

"""Training in several processes (torchrun), through accelerate: one student, a share of every batch for each.

The run is that of one process with the same config: the same batches, the same losses within rounding. What looks at
the whole batch (similarities, memories, class means, means over places, batch norms on GPUs) looks at that of all
processes. Two things differ: what modules draw at random (masks, stochastic depth) each process draws for itself, and
a memory that a number of batches does not fill exactly forgets its targets in another order.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer import processes
from trainer.errors import TrainError
from trainer.models.student import Student

if TYPE_CHECKING:
    from trainer.methods.method import Method


def join(device: torch.device) -> None:
    """Make the processes that torchrun started know each other; nothing where there is but one.

    Raises TrainError where accelerate is missing, or is not to use the device it is told.
    """
    if processes.started()[1] == 1:
        return
    state: Any = _accelerator(device).state
    if state.num_processes != processes.started()[1]:
        raise TrainError(f"torchrun started {processes.started()[1]} processes, and accelerate knows of another number")


def synchronise_batch_norm(student: Student, device: torch.device) -> None:
    """Have batch norms that are trained measure the whole batch, not each process's share of it.

    Raises TrainError on a CPU, where PyTorch cannot.
    """
    trained = [module for module in student.network.modules() if isinstance(module, _BatchNorm)]
    if processes.count() == 1 or not trained or student.keeps_statistics:
        return
    if device.type != "cuda":
        raise TrainError(
            f"student {student.name} has batch norms, which look at the whole batch, and PyTorch synchronises them on "
            "GPUs only: train in one process, or set student.batch_norm=freeze_statistics"
        )
    student.network = convert_sync_batchnorm(student.network)


def wrap(method: Method, device: torch.device) -> nn.Module | None:
    """The method with gradients averaged over processes; None where there is but one."""
    if processes.count() == 1:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of accelerate's word for a setting, in newer PyTorch
        prepared: nn.Module = _accelerator(device).prepare_model(method, device_placement=False)
    return prepared


def _accelerator(device: torch.device) -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError:
        raise TrainError(
            "training in several processes needs accelerate: pip install 'dit-distill[distributed]'"
        ) from None
    # Parts of a method may have no say in an update. Buffers are the same everywhere already.
    settings = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[settings])

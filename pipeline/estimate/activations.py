"""Whether Stage I keeps its activations or computes them twice: what a step needs against what the device has free."""

from collections.abc import Callable

import torch

from cache_schema.format.card import format_bytes
from pipeline.estimate.memory import MemorySettings, refine_phase
from pipeline.refine.config import RefineConfig
from pipeline.teachers import TeacherError, outline_teacher
from pipeline.teachers.diffusers_teacher import DiffusersTeacher
from pipeline.teachers.weightless import weightless_teacher

# Beside live tensors: what the allocator rounds up, and CUDA's libraries. gpu-check holds real peaks against it.
MARGIN = 1.15


def recomputes(teacher: DiffusersTeacher, config: RefineConfig, log: Callable[[str], None] = print) -> bool:
    """Say which of the two it is, and why; asked before the transformer is loaded.

    `config.gradient_checkpointing` has the first word. Otherwise activations are kept where they fit, which saves a
    forward pass in four: on a CPU, and on a GPU with room for a step as `dit-cache estimate --memory` counts it.
    """
    chosen, why = _choose(teacher, config)
    log(f"activations are {'computed twice (gradient checkpointing)' if chosen else 'kept'}: {why}")
    return chosen


def _choose(teacher: DiffusersTeacher, config: RefineConfig) -> tuple[bool, str]:
    if config.gradient_checkpointing is not None:
        return config.gradient_checkpointing, "as asked"
    if teacher.device.type != "cuda":
        return False, f"nothing was asked, and this is no GPU but {teacher.device}"
    try:
        needed = round(MARGIN * _step_bytes(teacher, config))
    except TeacherError as error:
        return True, f"what a step needs is not known ({error})"
    free = _free_bytes(teacher.device)
    said = f"a step that keeps them needs {format_bytes(needed)}, {teacher.device} has {format_bytes(free)} free"
    return needed > free, said


def _step_bytes(teacher: DiffusersTeacher, config: RefineConfig) -> int:
    """All that is on the device in a step that keeps its activations, the weights with it."""
    outline = outline_teacher(str(teacher.folder), resolution=teacher.resolution)
    settings = MemorySettings(
        teacher.dtype,
        limit=0,
        quantization=teacher.quantization,
        context=teacher.context,
        rank=config.rank,
        lora_targets=config.lora_targets,
        refine_batch=config.batch,
    )
    outlined = weightless_teacher(outline, settings.dtype, settings.quantization, settings.context)
    return refine_phase(outlined, settings, recompute=False).total


def _free_bytes(device: torch.device) -> int:
    """What the driver has free, and what PyTorch holds of the device without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

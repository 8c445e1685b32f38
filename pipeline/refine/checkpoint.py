"""Checkpoints of Stage I: LoRA weights, Adam's state and the run's history, whole or not there at all."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cache_schema.errors import DitDistillError
from cache_schema.storage.files import flush_directory, storage_errors, sweep_aside_files, write_file

FOLDER = "checkpoint"
# What runs that began before there was a choice did not write down.
_ALWAYS_SO = {
    "context": "joint",
    "quantization": None,
    "lora_targets": "attention",
    "sigma": "uniform",
    "grad_clip": None,
    "caption_dropout": 0.0,
    "flip": False,
    "train_guidance": None,
}
_STATE, _TENSORS = "state.json", "tensors.safetensors"


@dataclass
class Progress:
    """How far a run came. `identity` is what must be equal for it to go on; `validation` the held-out losses so far."""

    identity: dict[str, Any]
    step: int = 0
    seconds: float = 0.0
    validation: list[dict[str, float]] = field(default_factory=list)


def save_checkpoint(
    output: Path, progress: Progress, parameters: Mapping[str, Tensor], optimiser: torch.optim.Optimizer
) -> None:
    """Write the checkpoint of a step and drop the one before it; a kill at any moment leaves one of the two."""
    tensors = {f"lora.{name}": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": torch.as_tensor(value).cpu() for name, value in state.items()}
    new = output / f"{FOLDER}-{progress.step:08d}"
    aside = output / f".{new.name}.partial"
    with storage_errors(new):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_file(aside / _TENSORS, save(tensors))
        write_file(aside / _STATE, (json.dumps(vars(progress), indent=2) + "\n").encode())
        shutil.rmtree(new, ignore_errors=True)
        aside.rename(new)
        flush_directory(output)
    for old in _checkpoints(output):
        if old != new:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    output: Path,
    identity: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> Progress | None:
    """Restore the newest checkpoint of `output` into parameters and optimiser; None where there is none.

    Raises DitDistillError if it belongs to a run with other settings, or is damaged.
    """
    found = _checkpoints(output)
    if not found:
        return None
    folder = found[-1]
    try:
        progress = Progress(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
        tensors = load_file(folder / _TENSORS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DitDistillError(
            f"{folder}: not a checkpoint that can be read ({error}); remove that folder to start Stage I again"
        ) from None
    check_identity(progress.identity, identity, folder)
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[f"lora.{name}"])
        optimiser.load_state_dict(_adam_state(optimiser, tensors))
    except (KeyError, RuntimeError) as error:
        raise DitDistillError(
            f"{folder}: does not fit this teacher ({error}); remove that folder to start again"
        ) from None
    return progress


def newest_progress(output: Path) -> Progress | None:
    """How far the newest checkpoint of `output` is, read without its tensors; None where there is none to be read."""
    for folder in reversed(_checkpoints(output)):
        try:
            return Progress(**json.loads((folder / _STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
    return None


def check_identity(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: Path) -> None:
    """Raise DitDistillError, naming what differs, unless both are the same run."""
    theirs = {**_ALWAYS_SO, **theirs}
    differing = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if differing:
        name = differing[0]
        raise DitDistillError(
            f"{where} is of another run: {name} was {theirs.get(name)}, now it is {ours.get(name)}; "
            "use the same settings, or another --output"
        )


def remove_checkpoints(output: Path) -> None:
    """Drop every checkpoint, once the run is finished."""
    for path in [*_checkpoints(output), *output.glob(f".{FOLDER}-*.partial")]:
        shutil.rmtree(path, ignore_errors=True)
    sweep_aside_files(output)


def _checkpoints(output: Path) -> Sequence[Path]:
    return sorted(path for path in output.glob(f"{FOLDER}-*") if path.is_dir())


def _adam_state(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": optimiser.state_dict()["param_groups"]}

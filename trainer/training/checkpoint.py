"""Checkpoints: weights as safetensors, optimiser state readable with `weights_only=True`, written atomically."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from trainer.errors import TrainError
from trainer.models.weights import load_weights, save_weights
from trainer.training.pace import Timing

FOLDER = "checkpoints"
# What reading files raises that are not whole, or are of another run.
DAMAGE = (RuntimeError, ValueError, TypeError, LookupError, OSError, EOFError, UnpicklingError, TrainError)


@dataclass(frozen=True)
class Best:
    """The highest recall on validation classes that a run was measured at, and after how many updates."""

    recall_at_1: float
    update: int


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    update: int  # updates done
    seconds: float  # training time so far
    cache_id: str
    other_caches: dict[str, str] = field(default_factory=dict)  # ids of further caches, by what is read from them
    timed: Timing = field(default_factory=Timing)  # of its updates
    best: Best | None = None  # so far

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """Undo `dataclasses.asdict`; also of checkpoints that say nothing of times and scores."""
        timed, best = values.pop("timed", {}), values.pop("best", None)
        return cls(**values, timed=Timing(**timed), best=Best(**best) if best else None)


def save_checkpoint(
    run: Path,
    modules: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    average: nn.Module | None = None,
) -> Path:
    """Write a checkpoint into `run` and remove the older ones; a crash leaves the last complete one.

    `average` holds the moving average of the modules' weights, where there is one.
    """
    folder = run / FOLDER / f"update-{progress.update:08d}"
    aside = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    aside.mkdir(parents=True, exist_ok=True)
    save_weights(modules.state_dict(), aside / "weights.safetensors")
    if average is not None:
        save_weights(average.state_dict(), aside / "average.safetensors")
    torch.save(optimizer.state_dict(), aside / "optimizer.pt")
    (aside / "progress.json").write_text(json.dumps(asdict(progress)) + "\n")
    for file in aside.iterdir():
        _sync(file)
    if folder.exists():  # an interrupt right after a scheduled checkpoint
        shutil.rmtree(folder)
    aside.rename(folder)
    _sync(folder.parent)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)
    return folder


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = sorted((run / FOLDER).glob("update-*"))
    return found[-1] if found else None


def load_checkpoint(
    folder: Path,
    modules: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    average: nn.Module | None = None,
) -> Progress:
    """Restore modules, their average where there is one, and optimiser in place.

    Raises TrainError when the files do not fit the run.
    """
    try:
        modules.load_state_dict(load_weights(folder / "weights.safetensors", str(device)))
        if average is not None:
            average.load_state_dict(load_weights(folder / "average.safetensors", str(device)))
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
        return Progress.from_json(json.loads((folder / "progress.json").read_text()))
    except DAMAGE as error:
        reason = (str(error).splitlines() or ["a file of it is damaged"])[0]
        raise TrainError(f"cannot resume from {folder}: {reason}; start anew with --overwrite") from error


def remove_checkpoints(run: Path) -> None:
    """Remove the checkpoints of a finished run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: weights as safetensors, optimiser state readable with `weights_only=True`, written atomically."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from cache_schema.storage.files import flush_directory, write_file
from trainer.data.images import Fit
from trainer.errors import TrainError
from trainer.evaluation.worth import Worth
from trainer.models.weights import load_weights, save_weights
from trainer.training.pace import Timing

FOLDER = "checkpoints"
WEIGHTS, AVERAGE, PROGRESS = "weights.safetensors", "average.safetensors", "progress.json"
# What reading files raises that are not whole, or are of another run.
DAMAGE = (RuntimeError, ValueError, TypeError, LookupError, OSError, EOFError, UnpicklingError, TrainError)


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    update: int  # updates done
    seconds: float  # training time so far
    cache_id: str
    other_caches: dict[str, str] = field(default_factory=dict)  # ids of further caches, by what is read from them
    timed: Timing = field(default_factory=Timing)  # of its updates
    classes: int = 0  # that are trained on; 0: a checkpoint that does not say
    images: int = 0  # seen so far
    held_out: int = 0  # classes that are validated on; 0: none, or a checkpoint that does not say
    rows: str = ""  # a digest of what is trained and validated on; "": a checkpoint that does not say
    worth: Worth | None = None  # of the teacher, where it was looked at before the first update
    fit: Fit | None = None  # how its images are made square; None: a checkpoint that does not say

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """Undo `dataclasses.asdict`; also of checkpoints that say nothing of times and classes."""
        worth = values.get("worth")
        known = {"timed": Timing(**values.get("timed", {})), "worth": None if worth is None else Worth.from_json(worth)}
        return cls(**{**values, **known})


def save_checkpoint(
    run: Path,
    modules: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    average: nn.Module | None = None,
    keep: int = 1,
) -> Path:
    """Write a checkpoint into `run`, of which the newest `keep` stay; a crash leaves the last complete one.

    `average` holds the moving average of the modules' weights, where there is one.
    """
    folder = run / FOLDER / f"update-{progress.update:08d}"
    aside = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    aside.mkdir(parents=True, exist_ok=True)
    save_weights(modules.state_dict(), aside / WEIGHTS)
    if average is not None:
        save_weights(average.state_dict(), aside / AVERAGE)
    state = io.BytesIO()
    torch.save(optimizer.state_dict(), state)  # to a file on a full disk it would raise RuntimeError
    write_file(aside / "optimizer.pt", state.getbuffer())
    write_file(aside / PROGRESS, (json.dumps(asdict(progress)) + "\n").encode())
    if folder.exists():  # an interrupt right after a scheduled checkpoint
        shutil.rmtree(folder)
    aside.rename(folder)
    flush_directory(folder.parent)
    older = sorted(other for other in folder.parent.glob("update-*") if other < folder)
    for other in set(folder.parent.iterdir()) - {folder, *older[len(older) + 1 - keep :]}:
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
    with resuming(folder):
        modules.load_state_dict(load_weights(folder / WEIGHTS, str(device)))
        if average is not None:
            average.load_state_dict(load_weights(folder / AVERAGE, str(device)))
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=device, weights_only=True))
        return Progress.from_json(json.loads((folder / PROGRESS).read_text()))


@contextmanager
def resuming(folder: Path) -> Iterator[None]:
    """Say of what goes wrong with a checkpoint that a run cannot resume from it, and what could be done; TrainError."""
    try:
        yield
    except DAMAGE as error:
        older = [other for other in sorted(folder.parent.glob("update-*")) if other < folder]
        advice = f"remove it to go on from {older[-1].name}, or " if older else ""
        raise TrainError(
            f"cannot resume from {folder}: {_reason(error)}; {advice}start anew with --overwrite"
        ) from error


def read_progress(folder: Path) -> Progress:
    """Where a run stood at a checkpoint; raises TrainError when that is damaged."""
    try:
        return Progress.from_json(json.loads((folder / PROGRESS).read_text()))
    except DAMAGE as error:
        raise TrainError(f"{folder / PROGRESS} is damaged: {_reason(error)}") from error


def load_state(folder: Path, modules: nn.Module) -> None:
    """Give modules the weights of a checkpoint, the averaged ones where it has them; raises TrainError."""
    try:
        if (folder / AVERAGE).is_file():
            averaged = load_weights(folder / AVERAGE)
            modules.load_state_dict({name.removeprefix("module."): value for name, value in averaged.items()})
        else:
            modules.load_state_dict(load_weights(folder / WEIGHTS))
    except DAMAGE as error:
        raise TrainError(f"checkpoint {folder} does not fit its run and this cache: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or ["a file of it is damaged"])[0]


def remove_checkpoints(run: Path) -> None:
    """Remove the checkpoints of a finished run."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)

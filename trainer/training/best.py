"""The student of a run that did best on validation classes, kept beside the last one: a finished run of its own."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig, save_config
from trainer.methods.method import Method
from trainer.models.student import save_student
from trainer.runs import BEST, CONFIG, RESULT, is_finished, load_result
from trainer.training.run_folder import write_json

_BEFORE = ".best-before"  # where the one before is while another takes its place


@dataclass(frozen=True)
class Best:
    """The highest recall on validation classes that a run was measured at, and after how many updates."""

    recall_at_1: float
    update: int


def best_so_far(run: Path) -> Best | None:
    """What `keep_best` kept last, in this process or before it was interrupted; None where it kept nothing.

    To be asked for by the process that writes the run: what a kill left half done is mended or removed.
    """
    folder = run / BEST
    for left in run.glob(f".tmp-*-{BEST}"):
        shutil.rmtree(left, ignore_errors=True)
    if not folder.exists() and (run / _BEFORE).exists():
        (run / _BEFORE).rename(folder)  # a kill came between
    return Best(**load_result(folder)["best"]) if is_finished(folder) else None


def keep_best(run: Path, method: Method, config: TrainConfig, result: dict[str, Any]) -> None:
    """Replace the best student of a run, whole or not at all; `result` is what its `result.json` holds."""
    folder, aside, before = run / BEST, run / f".tmp-{os.getpid()}-{BEST}", run / _BEFORE
    for left in (aside, before):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    save_student(method.student, aside)
    method.save(aside)
    save_config(config, aside / CONFIG)
    write_json(aside / RESULT, result)
    if folder.exists():
        folder.rename(before)
    aside.rename(folder)
    shutil.rmtree(before, ignore_errors=True)

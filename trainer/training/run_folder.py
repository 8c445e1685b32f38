"""Writing a run's directory: what may be written there, and in which order; `trainer.runs` reads it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from cache_schema.errors import CacheStorageError
from cache_schema.storage.files import write_file
from trainer.config import TrainConfig, save_config
from trainer.errors import TrainError
from trainer.methods.method import Method
from trainer.methods.registry import find_method
from trainer.methods.settings import differing_fields, load_config
from trainer.models.student import save_student
from trainer.runs import BEST, BOARD, CACHES, CONFIG, DIVERGED, LOG, RESULT, SCORES, SplitName, is_finished, scores_file
from trainer.training.checkpoint import remove_checkpoints

# Of any method; result.json first, so that what is left of a removed run is never taken for a finished one.
FILES = (RESULT, SCORES, scores_file("validation"), "student.safetensors", "student.json", LOG, DIVERGED, CACHES)


def check_run(run: Path, config: TrainConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Raise TrainError where `config` may not be trained into `run`: two runs would mix, or a finished one be lost."""
    if overwrite or not (run / CONFIG).is_file():
        return
    if not resume:
        state = "a finished run" if is_finished(run) else "an unfinished run (--resume continues it)"
        raise TrainError(f"{run} holds {state}; give another --output, or --overwrite to replace it")
    changed = differing_fields(load_config(run / CONFIG), config)
    if changed:
        names = ", ".join(changed)
        raise TrainError(f"{run} was started with another {names}: resume without changing it")


def prepare_run(run: Path, config: TrainConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Make `run` the directory of `config`, after `check_run`; `overwrite` removes what a run left there.

    Files that are not a run's own stay.
    """
    check_run(run, config, resume, overwrite)
    if overwrite:
        for name in (*FILES, *_files_of_method(run), CONFIG):
            (run / name).unlink(missing_ok=True)
        for folder in (BOARD, BEST):
            shutil.rmtree(run / folder, ignore_errors=True)
        remove_checkpoints(run)
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / CONFIG)


def note_caches(run: Path, cache_id: str, others: dict[str, str]) -> None:
    """Say in a run's folder which caches it reads, until its result does."""
    write_json(run / CACHES, {"cache_id": cache_id, "other_caches": others})


def finish_run(run: Path, method: Method, result: dict[str, Any]) -> None:
    """Write what is kept of a run and drop the rest; `result.json`, the sign that it is finished, comes last."""
    save_student(method.student, run)
    method.save(run)
    (run / DIVERGED).unlink(missing_ok=True)  # of an attempt before this one
    write_json(run / RESULT, result)
    (run / CACHES).unlink(missing_ok=True)
    remove_checkpoints(run)


def save_scores(run: Path, split: SplitName, scores: dict[str, Any]) -> Path | None:
    """Keep a run's scores on a split in its folder; where that cannot be written, a colleague's say, only say so.

    Returns the file, None where there is none.
    """
    file = run / scores_file(split)
    try:
        write_json(file, scores)
        return file
    except CacheStorageError as error:
        print(f"note: the scores are not saved in {run} ({error.__cause__ or error})", file=sys.stderr)
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON, whole or not at all."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def _files_of_method(run: Path) -> tuple[str, ...]:
    """What the method of the run that is there left; nothing where its config says nothing."""
    try:
        return find_method(load_config(run / CONFIG).method).files
    except TrainError:
        return ()

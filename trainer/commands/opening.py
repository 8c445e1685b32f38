"""Opening what a command names: a cache, a run whose student stands for it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from cache_schema import Cache


def open_for(path: str, allow_partial: bool, verify: bool = True, local_cache: str | None = None) -> Cache:
    """Open a cache; where it is not complete and that is accepted, say how much is missing."""
    from cache_schema import open_cache

    cache = open_cache(path, allow_partial=allow_partial, verify=verify, local_cache=local_cache)
    if not cache.manifest.sealed:
        missing, total = cache.missing_samples, cache.manifest.dataset.feature_rows
        pulled = cache.manifest.provenance.pulled
        what = f"is a part ({pulled}): {missing} of {total} samples have no features here" if pulled else ""
        note = f"note: cache {path} {what or f'is not sealed: {missing} of {total} samples have no features yet'}"
        typer.echo(note, err=True)
    return cache


def require_student_alone(run: Path) -> None:
    """Raise TrainError for a run whose method is scored by more than its student, which alone is another thing."""
    from trainer.errors import TrainError
    from trainer.methods.registry import find_method
    from trainer.methods.settings import load_config
    from trainer.runs import CONFIG, is_finished

    if not is_finished(run):
        return  # an export, a student's file, or a folder that is refused for what it is
    method = load_config(run / CONFIG).method
    if find_method(method).scored != "student":
        raise TrainError(
            f"{run} reads the teacher's features at test time (method {method}): its student alone is not what was "
            "trained and scored; use a run of gcd, regression or baseline"
        )

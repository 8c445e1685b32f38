"""A run as it was at one of its checkpoints, in the form of a finished one."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import TrainConfig
from trainer.data.features import open_sources
from trainer.data.images import choose_fit
from trainer.errors import TrainError
from trainer.methods.method import Method
from trainer.methods.registry import find_method, mode_name
from trainer.methods.settings import load_config, without_teacher
from trainer.models.student import build_student
from trainer.runs import BEST, CONFIG, is_finished
from trainer.training.best import keep_best
from trainer.training.checkpoint import FOLDER, Progress, latest_checkpoint, load_state, read_progress

if TYPE_CHECKING:
    from cache_schema import Cache


@contextmanager
def run_at(run: Path, checkpoint: str, cache: Cache | None) -> Iterator[Path]:
    """A folder to be read like a finished run: of the `best` student, of the `last`, or of a checkpoint's folder.

    The last one is that of a finished run, or the newest checkpoint of another. A checkpoint may be called by its name
    alone, and is laid out in a folder that is gone afterwards. Raises TrainError where there is none such.
    """
    if checkpoint == "best":
        if not is_finished(run / BEST):
            raise TrainError(f"{run} kept no best student: train it with --validation-classes 0.2 --eval-every 1")
        yield run / BEST
        return
    if checkpoint == "last" and is_finished(run):
        yield run
        return
    folder = latest_checkpoint(run) if checkpoint == "last" else _named(run, checkpoint)
    if folder is None:
        raise TrainError(f"{run} has no checkpoint yet")
    if cache is None:
        raise TrainError(f"{folder} is laid out for features of a cache: score it on one, or take the best or the last")
    config, progress = load_config(run / CONFIG), read_progress(folder)
    if progress.worth is not None and not progress.worth.followed:
        config = without_teacher(config)
    with tempfile.TemporaryDirectory() as aside:
        keep_best(Path(aside), _restored(folder, config, progress, cache), config, _about(config, progress))
        yield Path(aside) / BEST


def _named(run: Path, name: str) -> Path:
    for folder in (Path(name), run / FOLDER / name):
        if (folder / "progress.json").is_file():
            return folder
    there = sorted(folder.name for folder in (run / FOLDER).glob("update-*"))
    has = f"has {', '.join(there)}" if there else "keeps checkpoints until it is finished, and has none"
    raise TrainError(f"{name} is no checkpoint of {run}, which {has}; or say best or last")


def _restored(folder: Path, config: TrainConfig, progress: Progress, cache: Cache) -> Method:
    """The method of a run with the weights of a checkpoint: the averaged ones, where there are any."""
    if not progress.classes:
        raise TrainError(f"{folder} does not say how many classes it was trained on: an older version wrote it")
    blank = {"pretrained": False, "weights": None, "batch_norm": "train"}  # its weights come from the checkpoint
    student = build_student(config.student.model_copy(update=blank))
    student.fit = progress.fit or choose_fit(config.fit, cache)
    kind = find_method(config.method)
    sources = open_sources(cache, kind.needs(config))
    method = kind(config, student, progress.classes, {name: source.shape for name, source in sources.items()})
    load_state(folder, method)
    return method


def _about(config: TrainConfig, progress: Progress) -> dict[str, object]:
    held_out = {"validation_classes": progress.held_out} if progress.held_out else {}
    return {
        **held_out,
        "method": config.method,
        "mode": mode_name(config.method),
        "seed": config.seed,
        "cache_id": progress.cache_id,
        "seconds": progress.seconds,
        "student_updates": progress.update,
        "images_seen": progress.images,
        "train_classes": progress.classes,
    }

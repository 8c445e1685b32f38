"""Reading a run's folder: its result, its config as written, its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from trainer.errors import TrainError

SplitName = Literal["test", "validation"]  # the images that a run is scored on
CONFIG, RESULT, SCORES, LOG = "config.json", "result.json", "eval.json", "metrics.jsonl"
BOARD = "tensorboard"  # the folder of its events
BEST = "best"  # the folder of the student that did best on validation classes
CACHES = "caches.json"  # the ids of what an unfinished run reads, so that nobody takes it for unused
DIVERGED = "diverged.json"  # why a run stopped, and on which images

# What every finished run says of itself.
ALWAYS: dict[str, type | tuple[type, ...]] = {
    "mode": str, "seed": int, "cache_id": str, "seconds": (int, float), "student_updates": int, "images_seen": int,
    "train_classes": int,
}  # fmt: skip


def is_finished(run: Path) -> bool:
    """A run writes `result.json` last."""
    return (run / RESULT).is_file()


def load_result(run: Path) -> dict[str, Any]:
    """What a finished run says about itself; raises TrainError when it is not finished."""
    if not is_finished(run):
        if not run.exists():
            raise TrainError(f"there is no run at {run}")
        started = (run / CONFIG).is_file()
        state = "is not finished: continue it with --resume" if started else "is not a run of dit-train"
        raise TrainError(f"{run} {state}")
    result = read_json(run / RESULT)
    lacking = [name for name in ALWAYS if name not in result]
    if lacking:
        raise TrainError(f"{run / RESULT} is damaged, it says nothing of {lacking[0]}; copy or make the run again")
    wrong = [name for name, kind in ALWAYS.items() if not isinstance(result[name], kind)]
    if wrong:
        said = f"{wrong[0]} is {json.dumps(result[wrong[0]])}"
        raise TrainError(f"{run / RESULT} is damaged, its {said}; copy or make the run again")
    return result


def refuse_without_teacher(path: Path, what: str) -> None:
    """Raise TrainError where `what` would take a run's student for what the run was scored by: it needs the teacher.

    `path`: a run's folder or its `student.safetensors`; others say nothing of it.
    """
    result = (path if path.is_dir() else path.parent) / RESULT
    if result.is_file() and read_json(result).get("scored", "student") != "student":
        raise TrainError(
            f"{path} is scored with the teacher's features of each image, and its student alone was not trained to do "
            f"without: {what} needs a run of another mode, distill say"
        )


def read_config(path: Path) -> dict[str, Any]:
    """The plain values of a `config.json`; raises TrainError when there is none or it is damaged."""
    if not path.is_file():
        raise TrainError(f"{path.parent} is not a run: it has no {path.name}")
    return read_json(path)


def cache_of_run(run: Path) -> str:
    """Where the cache is that a run was trained from; raises TrainError for a lone student file and for an export."""
    if not run.exists():
        raise TrainError(f"there is no run at {run}")
    cache = read_config(run / CONFIG).get("cache") if run.is_dir() else None
    if not cache:
        raise TrainError(f"{run} does not say which cache to evaluate on; give --cache")
    return str(cache)


def validation_share(run: Path) -> float:
    """The share of the training classes that a run held out; 0 for a lone student file, which cannot tell."""
    return float(read_config(run / CONFIG).get("validation_classes", 0.0)) if run.is_dir() else 0.0


def scores_file(split: SplitName) -> str:
    """The file of a run's folder with its scores on a split."""
    return SCORES if split == "test" else f"eval-{split}.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises TrainError that names a file which is not whole."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TrainError(f"{path} is missing") from None
    except ValueError as error:
        raise TrainError(f"{path} is damaged, it is not JSON ({error}); copy or make it again") from None
    if not isinstance(values, dict):
        raise TrainError(f"{path} is damaged: it should hold a JSON object; copy or make it again")
    return values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a log, in order; a line cut short by a crash ends it."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records

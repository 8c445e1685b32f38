"""Any trained student: a run's folder, its `student.safetensors` alone, or the folder of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.data.images import CENTRE
from trainer.errors import TrainError
from trainer.models.student import Student, load_student, rebuild_student
from trainer.runs import read_json

ABOUT = "dit_distill"  # what an export's config.json says beside what timm reads
WEIGHTS, CONFIG = "model.safetensors", "config.json"  # the names that timm and the hub look for


def is_export(path: Path) -> bool:
    """Whether a folder is one that `dit-train export` wrote."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file() and ABOUT in read_json(path / CONFIG)


def open_student(path: Path) -> Student:
    """The student of a run's folder, of its `student.safetensors`, or of an export; raises TrainError for others."""
    if is_export(path):
        return _load_export(path)
    if not path.exists():
        raise TrainError(f"there is no run or export at {path}")
    return load_student(path)


def shows_squashed(path: Path) -> bool:
    """Whether an export says that its student saw the middle of squashed images."""
    prepared = read_json(path / CONFIG).get("pretrained_cfg", {})
    return prepared.get("crop_mode") == "squash" and prepared.get("crop_pct") == CENTRE


def _load_export(folder: Path) -> Student:
    about = folder / CONFIG
    values: dict[str, Any] = read_json(about)
    try:
        prepared = values["pretrained_cfg"]
        size = prepared["input_size"][-1]
        fit = "squash" if prepared["crop_pct"] == 1.0 else "crop"
        input_ = {"size": size, "mean": prepared["mean"], "std": prepared["std"], "fit": fit}
        named = values["architecture"], values["model_args"]
    except (KeyError, TypeError, IndexError) as error:
        raise TrainError(f"{about} is damaged: it does not say {error}; export the run again") from None
    return rebuild_student(*named, input_, folder / WEIGHTS, about)

"""A trained method, as evaluation wants it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import TrainConfig
from trainer.data.features import open_sources
from trainer.methods.method import Method
from trainer.methods.registry import find_method
from trainer.methods.settings import load_config, without_teacher
from trainer.models.student import Student
from trainer.runs import CONFIG, load_result

if TYPE_CHECKING:
    from cache_schema import Cache


def config_as_trained(run: Path) -> TrainConfig:
    """What a finished run was trained by: its config, or that of the student alone where no teacher was followed."""
    config, worth = load_config(run / CONFIG), load_result(run).get("worth")
    return config if worth is None or worth["followed"] else without_teacher(config)


def load_trained(run: Path, student: Student, cache: Cache) -> Method:
    """The method of a finished run with what it saved, on the student's device, for the features of `cache`.

    Raises TrainError when they have another shape. What was only needed to train, the proxies say, is left random.
    """
    config = config_as_trained(run)
    kind = find_method(config.method)
    sources = open_sources(cache, kind.needs(config))
    shapes = {name: source.shape for name, source in sources.items()}
    method = kind(config, student, int(load_result(run)["train_classes"]), shapes)
    method.load(run)
    return method.to(next(student.parameters()).device)

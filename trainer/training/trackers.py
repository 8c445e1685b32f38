"""Weights & Biases and MLflow, through accelerate's own adapters: what a run logs, where a team looks at its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_schema.settings import flatten
from trainer.config import TrainConfig
from trainer.errors import TrainError

PROJECT = "dit-distill"


class Trackers:
    """The trackers of a run, each told its config once and its numbers as they come."""

    def __init__(self, config: TrainConfig, run: Path, names: Sequence[str]):
        """Raises TrainError for a tracker whose package is missing, or that cannot be started."""
        self.started: list[Any] = []
        try:
            for name in names:
                self.started.append(_start(name, run))
        except TrainError:
            self.close()  # of those before it
            raise
        values = {name: _plain(value) for name, value in flatten(config.model_dump()).items()}
        for tracker in self.started:
            tracker.store_init_configuration(values)

    def log(self, update: int, numbers: Mapping[str, float]) -> None:
        """Numbers of the state after `update`, by name."""
        for tracker in self.started:
            tracker.log(dict(numbers), step=update)

    def close(self) -> None:
        """Have them send what they still hold."""
        for tracker in self.started:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise TrainError for a tracker whose package is missing, before anything else is done."""
    for name in names:
        _kind(name)


def _start(name: str, run: Path) -> Any:
    kind = _kind(name)
    kwargs = {"wandb": {"name": run.name, "dir": str(run)}, "mlflow": {"run_name": run.name}}.get(name, {})
    if kind.requires_logging_directory:
        kwargs["logging_dir"] = str(run)
    from accelerate import PartialState

    PartialState()  # the adapters ask it which process they are in
    try:
        tracker = kind(PROJECT, **kwargs)
        tracker.start()
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrainError(f"track: {name} cannot be started: {first}") from error
    return tracker


def _kind(name: str) -> Any:
    """accelerate's adapter of a tracker."""
    try:
        from accelerate import tracking
    except ImportError:
        raise TrainError("track: trackers need accelerate: pip install 'dit-distill[distributed]'") from None
    if not getattr(tracking, f"is_{name}_available")():
        raise TrainError(f"track: {name} is not installed: pip install {name}, or leave --track out")
    return tracking.LOGGER_TYPE_TO_CLASS[name]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)

"""The log of a run, as if it had never been interrupted: one JSON object per line, and TensorBoard beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from cache_schema.storage.files import write_file
from trainer import processes
from trainer.config import TrainConfig
from trainer.runs import BOARD, LOG, read_metrics
from trainer.training.trackers import Trackers


class MetricsLog:
    """Appends records to a run's `metrics.jsonl`, for scripts, and their numbers to `tensorboard/`, for people.

    Records past `keep`, the update a run continues from, are dropped.
    """

    def __init__(self, run: Path, keep: int = 0, trackers: Trackers | None = None):
        kept = [json.dumps(record) + "\n" for record in read_metrics(run / LOG) if record["update"] <= keep]
        write_file(run / LOG, "".join(kept).encode())
        self._file = (run / LOG).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / BOARD), purge_step=keep + 1)
        self._trackers = trackers

    def write(self, update: int, **record: Any) -> None:
        """Append one record of the state after `update`; flushed so that a run can be followed with `tail -f`."""
        self._file.write(json.dumps({"update": update, **record}) + "\n")
        self._file.flush()
        numbers = dict(_numbers(record))
        for name, value in numbers.items():
            self._board.add_scalar(name, value, update)
        if self._trackers is not None:
            self._trackers.log(update, numbers)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._board.close()
        if self._trackers is not None:
            self._trackers.close()


class NoLog(nullcontext[Any]):
    """Of the processes that leave it to the first one to write."""

    def __enter__(self) -> NoLog:
        return self

    def write(self, update: int, **record: Any) -> None:
        """Write nothing."""


def open_log(run: Path, config: TrainConfig, keep: int = 0) -> MetricsLog | NoLog:
    """The log of a run in the process that writes it, as `MetricsLog` says; in any other one nothing."""
    if not processes.leads():
        return NoLog()
    return MetricsLog(run, keep, Trackers(config, run, config.track) if config.track else None)


def _numbers(record: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a nested record, by their names joined with slashes, which TensorBoard groups by."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{within}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield within + name, value


def mean_losses(records: list[dict[str, Any]], after: int) -> dict[str, float]:
    """Mean of each loss over the training records past update `after`."""
    losses = [record["losses"] for record in records if "losses" in record and record["update"] > after]
    return {name: sum(values[name] for values in losses) / len(losses) for name in (losses[-1] if losses else {})}

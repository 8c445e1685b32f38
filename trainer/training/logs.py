"""The log of a run, as if it had never been interrupted: one JSON object per line, and TensorBoard beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from cache_schema.storage.files import write_file
from trainer.runs import BOARD, LOG, read_metrics


class MetricsLog:
    """Appends records to a run's `metrics.jsonl`, for scripts, and their numbers to `tensorboard/`, for people.

    Records past `keep`, the update a run continues from, are dropped.
    """

    def __init__(self, run: Path, keep: int = 0):
        kept = [json.dumps(record) + "\n" for record in read_metrics(run / LOG) if record["update"] <= keep]
        write_file(run / LOG, "".join(kept).encode())
        self._file = (run / LOG).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / BOARD), purge_step=keep + 1)

    def write(self, update: int, **record: Any) -> None:
        """Append one record of the state after `update`; flushed so that a run can be followed with `tail -f`."""
        self._file.write(json.dumps({"update": update, **record}) + "\n")
        self._file.flush()
        for name, value in _numbers(record):
            self._board.add_scalar(name, value, update)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._board.close()


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

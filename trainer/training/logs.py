"""The log of a run: one JSON object per line, as if the run had never been interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any


class MetricsLog:
    """Appends records to `metrics.jsonl`, after dropping those past `keep`, the update a run continues from."""

    def __init__(self, path: Path, keep: int = 0):
        kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["update"] <= keep]
        path.write_text("".join(kept))
        self._file = path.open("a")

    def write(self, **record: Any) -> None:
        """Append one record; flushed so that a run can be followed with `tail -f`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a log, in order; a line cut short by a crash ends it."""
    records: list[dict[str, Any]] = []
    if not path.is_file():
        return records
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def mean_losses(records: list[dict[str, Any]], after: int) -> dict[str, float]:
    """Mean of each loss over the training records past update `after`."""
    losses = [record["losses"] for record in records if "losses" in record and record["update"] > after]
    return {name: sum(values[name] for values in losses) / len(losses) for name in (losses[-1] if losses else {})}

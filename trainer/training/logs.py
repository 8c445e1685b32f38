"""The log of a run: one JSON object per line, as if the run had never been interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from cache_schema.storage.files import write_file
from trainer.runs import read_metrics


class MetricsLog:
    """Appends records to `metrics.jsonl`, after dropping those past `keep`, the update a run continues from."""

    def __init__(self, path: Path, keep: int = 0):
        kept = [json.dumps(record) + "\n" for record in read_metrics(path) if record["update"] <= keep]
        write_file(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        """Append one record; flushed so that a run can be followed with `tail -f`."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def mean_losses(records: list[dict[str, Any]], after: int) -> dict[str, float]:
    """Mean of each loss over the training records past update `after`."""
    losses = [record["losses"] for record in records if "losses" in record and record["update"] > after]
    return {name: sum(values[name] for values in losses) / len(losses) for name in (losses[-1] if losses else {})}

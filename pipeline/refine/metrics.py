"""What Stage I measures, step by step: metrics.jsonl for scripts, TensorBoard for people."""

import json
from pathlib import Path
from types import TracebackType
from typing import IO

from torch.utils.tensorboard import SummaryWriter

from cache_schema.storage.files import write_file


class MetricsLog:
    """Appends one JSON line per call; lines and events after `step`, of a run that was interrupted, are dropped."""

    def __init__(self, output: Path, step: int, enabled: bool = True) -> None:
        self.output, self.step, self.enabled = output, step, enabled
        self._file: IO[str] | None = None
        self._board: SummaryWriter | None = None

    def __enter__(self) -> "MetricsLog":
        if self.enabled:
            self.output.mkdir(parents=True, exist_ok=True)
            path = self.output / "metrics.jsonl"
            write_file(path, "".join(line + "\n" for line in _lines_until(path, self.step)).encode())
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(self.output / "tensorboard"), purge_step=self.step + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, **values: float) -> None:
        """Record values of a step (the first is 1); flushed, for a resumed run does not make them again."""
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            written = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # the line that a kill cut short
        if isinstance(written, int) and written <= step:
            kept.append(line)
    return kept

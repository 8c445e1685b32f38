"""The unfinished part of an annotation: small files in a folder beside the result, each whole or not there."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache_schema.storage.files import write_file
from pipeline.annotate.config import AnnotateError

Rows = dict[int, dict[str, Any]]  # index of the sample → columns


class WorkFolder:
    """What earlier runs of the same command have done. settings: what must be equal for it to be the same.

    Raises AnnotateError, naming what differs, for the folder of another command.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.folder = work_path(output)
        file = self.folder / "settings.json"
        if file.exists():
            check_settings(_load(file), settings, self.folder)
        else:
            write_file(file, json.dumps(settings, indent=2).encode())

    def load(self, stage: str) -> Rows:
        """Everything that was saved of a stage."""
        rows: Rows = {}
        for path in sorted(self.folder.glob(f"{stage}-*.json")):
            rows |= {int(index): row for index, row in _load(path).items()}
        return rows

    def save(self, stage: str, rows: Rows) -> None:
        """Save rows of a stage, which are not lost from here on."""
        name = f"{stage}-{min(rows):08d}-{max(rows):08d}.json"
        write_file(self.folder / name, json.dumps(rows).encode())


def work_path(output: Path) -> Path:
    """Where the unfinished part of `output` is."""
    return output.with_name(f"{output.name}.work")


def remove_work(output: Path) -> None:
    """Drop the work folder, if there is one, once its rows are in the result."""
    shutil.rmtree(work_path(output), ignore_errors=True)


def check_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: Path) -> None:
    """Raise AnnotateError, naming the first difference, unless both are settings of the same command."""
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            raise AnnotateError(
                f"{where} was made with other settings: {name} was {_short(theirs.get(name))}, now it is "
                f"{_short(ours.get(name))}; use the same settings, choose another --output, or remove it"
            )


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise AnnotateError(f"{path}: damaged ({error}); remove this file and run the same command again") from None
    return content


def _short(value: object) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""What a run folder's results were made with: one record per step, in steps.json beside them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_schema.errors import DitDistillError
from cache_schema.storage.files import write_file
from pipeline.annotate.config import AnnotateConfig
from pipeline.config import SETTINGS, RunConfig, Step

RECORDS_NAME = "steps.json"

# Whose settings each step's result depends on.
_PARTS: dict[Step, tuple[str, ...]] = {
    "annotate": ("data", "annotate"),
    "refine": ("data", "teacher", "refine"),
    "probe": ("data", "teacher", "probe"),
    "build": ("data", "teacher", "build"),
    "verify": (),
}

_OF_DETECTOR = {"detector", "detector_revision", "box_threshold"}
_OF_CAPTIONER = {"captioner", "captioner_revision", "instruction", "max_new_tokens", "crop_side", "dtype"}


@dataclass(frozen=True)
class Record:
    """What a step was begun with. settings: by dotted name; inputs, result: digests; no result until it ended."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    result: str | None = None


def settings_of(config: RunConfig, step: Step) -> dict[str, Any]:
    """The settings that a step's result depends on, by dotted name, as plain values."""
    # What may change while a step is under way may change after it too.
    unused = SETTINGS.resumable() | {f"annotate.{name}" for name in _unused(config.annotate)}
    return {
        name: value
        for name, value in SETTINGS.flat(config).items()
        if name.partition(".")[0] in _PARTS[step] and name not in unused
    }


def _unused(config: AnnotateConfig) -> set[str]:
    unused = set() if config.boxes == "detector" else _OF_DETECTOR
    unused = unused | {"padding"} if config.boxes == "full" else unused
    return unused if config.captions == "vlm" else unused | _OF_CAPTIONER


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What differs between the settings of a record and those of now, in words, a string each."""
    return [
        f"{name} was {_short(theirs.get(name))}, now it is {_short(ours.get(name))}"
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if theirs.get(name) != ours.get(name)
    ]


def load_records(folder: Path) -> dict[str, Record]:
    """Every record of a run folder, by step. Raises DitDistillError for a file that holds something else."""
    path = folder / RECORDS_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {step: Record(**record) for step, record in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DitDistillError(
            f"{path}: damaged ({error}); remove this file, and every step is held against its own records again"
        ) from None


def save_record(folder: Path, step: Step, record: Record | None) -> None:
    """Set the record of a step, or with None drop it; the file is replaced whole."""
    records: dict[str, Record] = {**load_records(folder)}
    records.pop(step, None)
    if record is not None:
        records[step] = record
    # In the order of the steps: two runs that share a build may end it one after the other.
    document = {name: asdict(records[name]) for name in _PARTS if name in records}
    write_file(folder / RECORDS_NAME, (json.dumps(document, indent=2) + "\n").encode())


def _short(value: Any) -> str:
    text = "not set" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""How far a run folder is: for each step, whether its result is there and was made with this configuration."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cache_schema.encoding.fidelity import require_cosine
from cache_schema.errors import CacheNotFound, DitDistillError, LowFidelity
from cache_schema.format.identity import canonical_json
from cache_schema.format.manifest_file import MANIFEST_NAME, load_manifest
from cache_schema.storage.local import LocalFolder
from pipeline.chain.records import Record, differences, load_records, save_record, settings_of
from pipeline.config import RunConfig, Step
from pipeline.datasets.base import Sample
from pipeline.teachers.weights import LORA_NAME, LORA_RECORD_NAME, file_digest

OUTPUTS: dict[Step, str] = {
    "annotate": "annotations.parquet",
    "refine": "lora",
    "probe": "probe",
    "build": "cache",
    "verify": "cache",
}
# What is made from what a step makes.
_DERIVED: dict[Step, tuple[Step, ...]] = {"annotate": ("refine", "build"), "refine": ("build",)}
# Made anew rather than refused: nothing is lost with an old answer.
_ANSWERS: tuple[Step, ...] = ("probe", "verify")
_PROBE_RECORD = "probe.json"

# done: there and made with this configuration. begun: under way. unknown: there, but not made here or changed since, so
# that the step itself has to look. stale: made with another configuration.
StateName = Literal["done", "begun", "unknown", "to do", "stale"]


@dataclass(frozen=True)
class State:
    """How far a step is. settings, inputs: of a stale one, in words, what differs. recorded: whether we began it."""

    step: Step
    name: StateName
    output: Path
    settings: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    recorded: bool = True

    @property
    def differing(self) -> tuple[str, ...]:
        return self.settings + self.inputs


def output_of(folder: Path, step: Step) -> Path:
    """Where a step's result is."""
    return folder / OUTPUTS[step]


def config_for(config: RunConfig, folder: Path, step: Step) -> RunConfig:
    """The configuration as a step sees it: what follows `annotate` takes its boxes and captions."""
    if step == "annotate" or "annotate" not in config.steps:
        return config
    return replace(config, data=replace(config.data, annotations=output_of(folder, "annotate")))


def lora_for(config: RunConfig, folder: Path) -> Path | None:
    """The LoRA with which the teacher is probed and cached; None if the original one is."""
    return output_of(folder, "refine") if "refine" in config.steps else None


def stale_results(states: Sequence[State]) -> list[State]:
    """The stale results, and those of ours that were made from them."""
    stale = {state.step for state in states if state.name == "stale"}
    stale |= {derived for step in stale for derived in _DERIVED.get(step, ())}
    # What somebody else put there is not ours to remove: its step will refuse it.
    return [state for state in states if state.step in stale and state.name != "to do" and state.recorded]


def digest_samples(samples: Sequence[Sample]) -> str:
    """SHA-256 over everything that a data set says of its images before one is read."""
    rows = [[s.id, s.split, s.label, s.class_name, s.source, s.box, s.box_source, s.caption] for s in samples]
    return hashlib.sha256(canonical_json(rows).encode()).hexdigest()


class RunFolder:
    """A run folder under one configuration. samples: those of the data set, `data.annotations` included."""

    def __init__(self, folder: Path, config: RunConfig, samples: Sequence[Sample]) -> None:
        self.folder, self.config = folder, config
        self._samples_digest = digest_samples(samples)

    def states(self) -> list[State]:
        """How far every step of the configuration is, in order."""
        return [self.state(step) for step in self.config.steps]

    def state(self, step: Step) -> State:
        """How far a step is. Nothing large is read: neither images nor a model's weights nor features."""
        output, record = output_of(self.folder, step), load_records(self.folder).get(step)
        if not output.exists() and not _work_of(output).exists():
            return State(step, "to do", output)
        if record is None:
            return State(step, "to do" if step in _ANSWERS else "unknown", output, recorded=False)
        settings = differences(record.settings, settings_of(self.config, step))
        inputs = [
            f"{name} changed"
            for name, digest in self._inputs(step).items()
            # What a step before this one has still to make cannot be compared yet.
            if digest is not None and digest != record.inputs.get(name)
        ]
        if settings or inputs:
            return State(step, "to do" if step in _ANSWERS else "stale", output, tuple(settings), tuple(inputs))
        if record.result is None:
            return State(step, "to do" if step in _ANSWERS else "begun", output)
        return State(step, "done" if record.result == self._result(step) else "unknown", output)

    def begin(self, state: State) -> Record:
        """Record what a step is begun with, unless its result is somebody else's until the step itself has looked."""
        inputs = {name: digest for name, digest in self._inputs(state.step).items() if digest is not None}
        record = Record(settings_of(self.config, state.step), inputs)
        if state.name != "unknown":
            save_record(self.folder, state.step, record)
        if state.step == "build":
            save_record(self.folder, "verify", None)
        return record

    def finish(self, step: Step, record: Record) -> None:
        """Record that a step has ended well, and with which result. Raises DitDistillError if that is not intact."""
        result, output = self._result(step), output_of(self.folder, step)
        if result is None:
            raise DitDistillError(
                f"{output} is not what {step} wrote; remove it and run the same command again, which makes it anew"
            )
        save_record(self.folder, step, replace(record, result=result))

    def remove(self, step: Step) -> None:
        """Take a step's result and record away. A kill on the way leaves either the result or nothing."""
        output = output_of(self.folder, step)
        for path in (output, _work_of(output)):
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.is_dir():
                aside = path.with_name(f".{path.name}.removed-{os.getpid()}")
                path.rename(aside)
        save_record(self.folder, step, None)
        self.sweep()

    def sweep(self) -> None:
        """Remove what `remove` was interrupted at."""
        for aside in self.folder.glob(".*.removed-*"):
            shutil.rmtree(aside, ignore_errors=True)

    def _inputs(self, step: Step) -> dict[str, str | None]:
        """Digests of what a step reads besides its settings; None for what is not there yet."""
        if step == "verify":
            return {"the cache": self._result("build")}
        inputs: dict[str, str | None] = {"the data set (images, classes, boxes or captions)": self._samples_digest}
        if step != "annotate":
            used = "annotate" in self.config.steps
            inputs["the annotation file"] = self._result("annotate") if used else "none"
        if step in ("probe", "build"):
            inputs["the LoRA"] = self._result("refine") if "refine" in self.config.steps else "none"
        return inputs

    def _result(self, step: Step) -> str | None:
        """Digest of a step's finished result, None where there is none."""
        output = output_of(self.folder, step)
        if step == "annotate":
            return _digest(output)
        if step == "refine":
            return _lora_digest(output)
        if step == "probe":
            return _digest(output / _PROBE_RECORD)
        return self._cache_id(output) if step == "build" else _digest(output / MANIFEST_NAME)

    def _cache_id(self, cache: Path) -> str | None:
        try:
            manifest = load_manifest(LocalFolder(cache))
        except CacheNotFound:
            return None
        if not manifest.sealed:
            return None
        if self.config.build.min_cosine is not None:
            try:
                require_cosine(manifest.fidelity, self.config.build.min_cosine, manifest.label)
            except LowFidelity:
                return None
        return manifest.cache_id


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _lora_digest(folder: Path) -> str | None:
    """What the record of Stage I says of the LoRA, provided that the file is that one."""
    try:
        recorded = json.loads((folder / LORA_RECORD_NAME).read_text(encoding="utf-8"))["lora_digest"]
        return recorded if file_digest(folder / LORA_NAME) == recorded else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _work_of(output: Path) -> Path:
    from pipeline.annotate.work import work_path

    return work_path(output)

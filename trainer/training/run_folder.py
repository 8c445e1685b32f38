"""A run's directory: what may be written there, and whether a run is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig, differing_fields, load_config, save_config
from trainer.errors import TrainError
from trainer.methods.objective import Objective
from trainer.models.student import save_student
from trainer.training.checkpoint import remove_checkpoints, save_weights

FILES = (
    "result.json", "eval.json", "config.json", "metrics.jsonl",
    "student.safetensors", "student.json", "gim.safetensors",
)  # fmt: skip


def is_finished(run: Path) -> bool:
    """A run writes `result.json` last."""
    return (run / "result.json").is_file()


def load_result(run: Path) -> dict[str, Any]:
    """What a finished run says about itself; raises TrainError when it is not finished."""
    if not is_finished(run):
        started = (run / "config.json").is_file()
        state = "is not finished: continue it with --resume" if started else "is not a run of dit-train"
        raise TrainError(f"{run} {state}")
    return json.loads((run / "result.json").read_text())


def check_run(run: Path, config: TrainConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Raise TrainError where `config` may not be trained into `run`: two runs would mix, or a finished one be lost."""
    if overwrite or not (run / "config.json").is_file():
        return
    if not resume:
        state = "a finished run" if is_finished(run) else "an unfinished run (--resume continues it)"
        raise TrainError(f"{run} holds {state}; give another --output, or --overwrite to replace it")
    changed = differing_fields(load_config(run / "config.json"), config)
    if changed:
        names = ", ".join(changed)
        raise TrainError(f"{run} was started with another {names}: resume without changing it")


def prepare_run(run: Path, config: TrainConfig, resume: bool = False, overwrite: bool = False) -> None:
    """Make `run` the directory of `config`, after `check_run`; `overwrite` removes what a run left there.

    Files that are not a run's own stay.
    """
    check_run(run, config, resume, overwrite)
    if overwrite:
        for name in FILES:
            (run / name).unlink(missing_ok=True)
        remove_checkpoints(run)
    run.mkdir(parents=True, exist_ok=True)
    save_config(config, run / "config.json")


def finish_run(run: Path, objective: Objective, result: dict[str, Any]) -> None:
    """Write what is kept of a run and drop the rest; `result.json`, the sign that it is finished, comes last."""
    save_student(objective.student, run)
    if objective.gim is not None:
        save_weights(objective.gim.state_dict(), run / "gim.safetensors")
    write_json(run / "result.json", result)
    remove_checkpoints(run)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n")

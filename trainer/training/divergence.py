"""What a run that diverges says: which part is not finite, since when, on which images, and what is left of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cache_schema.storage.files import write_file
from trainer import processes
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.data.features import sample_ids, some_of
from trainer.device import autocast
from trainer.errors import SharedError, TrainError
from trainer.methods.method import Method, Moment
from trainer.runs import DIVERGED
from trainer.training.assembly import Parts
from trainer.training.checkpoint import latest_checkpoint
from trainer.training.step import parts_of, seed_update


def diverged(parts: Parts, run: Path, update: int, losses: dict[str, Tensor]) -> TrainError:
    """The error for a loss that is not finite at 0-based `update`, whose step was not taken.

    The batch is made again and looked at: its features first, then the weights, then what each module makes of it. Of
    several processes each looks at its share, all come along, and all get the same error.
    """
    values = {name: value.item() for name, value in losses.items()}
    shares = processes.everyones(values)
    at = next((at for at, share in enumerate(shares) if not math.isfinite(share["loss"])), 0)
    said = ", ".join(f"{name} {value:g}" for name, value in shares[at].items())
    what, advice = f"the loss is not finite at update {update + 1} ({said})", parts.method.advice
    batch = parts.batches[update].to(parts.device, parts.feature_dtype)
    source, ids = _broken_features(parts, batch, update)
    if source:
        what = f"{what}: the cached features {source!r} of {some_of(ids)} are not finite"
        return _error(parts, run, update, what, parts.batches.sources[source].how_to_check)
    if _names_of_broken(parts.method.named_parameters()):
        # The batch to look at is the one before: its loss was finite, and its gradients were not.
        what = f"{what}: {_broken_tensors(parts.method, f'update {update}')}"
        return _error(parts, run, max(update - 1, 0), what, advice)
    moment = Moment(update, parts.updates)
    module = processes.everyones(_first_broken_module(parts.method, batch, parts.config, moment))[at]
    what = (
        f"{what}: weights and features are finite, {f'the output of {module}' if module else 'a sum of losses'} is not"
    )
    exact = parts.config.model_copy(update={"precision": "float32"})
    if module and processes.everyones(_first_broken_module(parts.method, batch, exact, moment))[at] is None:
        advice = "it is in float32: add --set precision=float32"
    return _error(parts, run, update, what, advice)


def refuse_broken(parts: Parts, run: Path, done: int) -> None:
    """Raise TrainError where tensors are not finite after `done` updates: a loss is taken before its update."""
    if _names_of_broken(parts.method.state_dict().items()):
        when = "the last update" if done == parts.updates else f"update {done}"
        raise _error(parts, run, done - 1, _broken_tensors(parts.method, when), parts.method.advice)


def _error(parts: Parts, run: Path, update: int, what: str, advice: str) -> TrainError:
    """The line for people, on the batch of 0-based `update`; what it leaves out goes into the run's folder."""
    ids = sample_ids(parts.cache, parts.batches.rows_of_all(update))
    checkpoint = latest_checkpoint(run)
    about = {"what": what, "update": update + 1, "samples": ids, "checkpoint": checkpoint and str(checkpoint)}
    if processes.leads():
        write_file(run / DIVERGED, (json.dumps(about, indent=2) + "\n").encode())
    processes.wait_for_all()  # or one that ends first would have the others ended before it is written
    kept = f"last good checkpoint: {checkpoint.name}" if checkpoint else "no checkpoint was saved before it"
    return SharedError(
        f"{run}: {what}; {advice}, and start anew with --overwrite "
        f"({kept}; update {update + 1} was of {some_of(ids)}, all of them in {run / DIVERGED})"
    )


def _broken_features(parts: Parts, batch: Batch, update: int) -> tuple[str, list[str]]:
    """Whose features of a batch are not finite, and the ids of the samples; "" where all are finite."""
    found = batch.broken_features()
    own = ("", []) if found is None else (found[0], sample_ids(parts.cache, parts.batches.rows(update)[found[1]]))
    shares: list[tuple[str, list[str]]] = processes.everyones(own)
    source = next((name for name, _ in shares if name), "")
    return source, [each for name, ids in shares if name == source for each in ids]


def _broken_tensors(method: Method, when: str) -> str:
    """How many tensors are not finite, in which parts of the method, with an example."""
    state = method.state_dict()
    broken = _names_of_broken(state.items())
    counts = [
        f"{sum(name.startswith(f'{part}.') for name in broken)} of {part}"
        for part in dict.fromkeys(name.partition(".")[0] for name in broken)
    ]
    how_many = f"{len(broken)} of the {len(state)} tensors are not finite after {when}"
    return f"{how_many}, for example {broken[0]} ({', '.join(counts)})"


def _names_of_broken(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [name for name, value in tensors if not value.isfinite().all()]


@torch.no_grad()
def _first_broken_module(method: Method, batch: Batch, config: TrainConfig, moment: Moment) -> str | None:
    """The first module whose output on a batch is not finite, as it was drawn in training; None if all are finite."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in method.named_modules() if name]
    try:
        seed_update(config, moment)
        with autocast(batch.images.device, config.precision, method.student), torch.compiler.set_stance("force_eager"):
            for part in parts_of(batch, config):
                method(part, moment)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None

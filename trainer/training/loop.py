"""The training loop: batches from the cache, one objective, Adam with cosine annealing, exact resume."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from trainer.config import TrainConfig
from trainer.data.batches import TrainingBatches, iterate
from trainer.device import choose_device
from trainer.errors import TrainError
from trainer.evaluation.evaluate import TestSplit, evaluate_modules, open_test_split
from trainer.methods.objective import Objective, build_objective
from trainer.models.heads import cal_ramp
from trainer.models.student import build_student
from trainer.training.checkpoint import Progress, latest_checkpoint, load_checkpoint, save_checkpoint
from trainer.training.interrupts import DeferredInterrupt
from trainer.training.logs import MetricsLog, mean_losses, read_metrics
from trainer.training.optim import learning_rate, make_optimizer
from trainer.training.run_folder import finish_run, prepare_run
from trainer.training.step import finite_losses, train_step

if TYPE_CHECKING:
    from cache_schema import Cache

FIT_UPDATES = 8  # batches whose features tell the GIM their scale, where it asks


@dataclass(frozen=True)
class Parts:
    """What a run is made of, once its config and its cache have been found to fit."""

    config: TrainConfig
    cache: Cache
    device: torch.device
    batches: TrainingBatches
    test: TestSplit | None  # only where recall is followed during training
    objective: Objective
    optimizer: torch.optim.Optimizer

    @property
    def updates(self) -> int:
        return self.config.updates or self.config.epochs * self.batches.per_epoch


def train(
    config: TrainConfig, cache: Cache, run: Path, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Train one student into `run`; returns what `result.json` holds.

    `resume` continues a run of the same config from its last checkpoint, and starts one where there is none;
    `overwrite` replaces whatever run is there. The directory is touched only once everything the run needs is
    known to be there. After Ctrl-C or SIGTERM the update in progress is finished and saved, then KeyboardInterrupt
    is raised. Raises TrainError for anything that cannot be trained on.
    """
    parts = _assemble(config, cache)
    batches, total = parts.batches, parts.updates
    prepare_run(run, config, resume, overwrite)
    progress = _start(parts, run, resume)
    began = time.monotonic() - progress.seconds
    with (
        MetricsLog(run / "metrics.jsonl", keep=progress.update) as log,
        closing(iterate(batches, progress.update, total, config.workers)) as stream,
        tqdm(total=total, initial=progress.update, desc=config.mode, unit="update", mininterval=0.5) as bar,
        DeferredInterrupt() as interrupt,
    ):
        for update, batch in enumerate(stream, start=progress.update):
            rate = learning_rate(update, total, config.optim)
            ramp = cal_ramp(update, total, config.loss.alpha_warmup)
            losses = train_step(parts.objective, parts.optimizer, batch.to(parts.device), rate, config, update, ramp)
            done = update + 1
            epoch, epoch_ends = done / batches.per_epoch, done % batches.per_epoch == 0
            bar.update()
            if done % config.log_every == 0 or done == total:
                values = finite_losses(losses, done)
                seen = (done - progress.update) * batches.batch_rows
                speed = seen / (time.monotonic() - began - progress.seconds)
                log.write(update=done, epoch=round(epoch, 4), lr=rate, losses=values, images_per_second=speed)
                bar.set_postfix(epoch=f"{epoch:.1f}", loss=f"{values['loss']:.3f}", refresh=False)
            if done == total:
                break
            if epoch_ends and _due(epoch, config.eval_every):
                log.write(update=done, epoch=epoch, eval=_evaluate(parts))
            if interrupt.requested or (epoch_ends and _due(epoch, config.checkpoint_every)):
                now = Progress(done, time.monotonic() - began, cache.manifest.cache_id)
                save_checkpoint(run, parts.objective, parts.optimizer, now)
            if interrupt.requested:
                raise KeyboardInterrupt
    result = _describe(parts, run, time.monotonic() - began)
    finish_run(run, parts.objective, result)
    return result


def _assemble(config: TrainConfig, cache: Cache) -> Parts:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    student = build_student(config.student)
    batches = TrainingBatches(cache, config, student.input_size)
    test = open_test_split(cache, student.input_size, config.image_memory_gb) if config.eval_every else None
    objective = build_objective(config, student, batches.classes, batches.token_shape).to(device)
    return Parts(config, cache, device, batches, test, objective, make_optimizer(objective, config.optim))


def _start(parts: Parts, run: Path, resume: bool) -> Progress:
    """Restore the last checkpoint, or begin at update 0."""
    manifest, objective = parts.cache.manifest, parts.objective
    checkpoint = latest_checkpoint(run) if resume else None
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, objective, parts.optimizer, parts.device)
        if progress.cache_id != manifest.cache_id:
            trained_on = f"cache {progress.cache_id[:8]}, not on {manifest.label}"
            raise TrainError(f"{run} was trained on {trained_on}: give that cache, or start anew with --overwrite")
        return progress
    if objective.gim is not None and parts.config.gim.token_norm == "standardize":
        sample = [parts.batches[update].to(parts.device).tokens for update in range(FIT_UPDATES)]
        objective.gim.tokens.fit(torch.cat([tokens for tokens in sample if tokens is not None]))
    return Progress(0, 0.0, manifest.cache_id)


def _due(epoch: float, every: int) -> bool:
    return every > 0 and round(epoch) % every == 0


def _evaluate(parts: Parts) -> dict[str, Any]:
    assert parts.test is not None
    student, gim, tap = parts.objective.student, parts.objective.gim, parts.config.tap
    return evaluate_modules(student, gim, parts.test, tap, parts.batches.timesteps, parts.device)[0]


def _describe(parts: Parts, run: Path, seconds: float) -> dict[str, Any]:
    batches, total = parts.batches, parts.updates
    return {
        "mode": parts.config.mode,
        "seed": parts.config.seed,
        "cache_id": parts.cache.manifest.cache_id,
        "seconds": round(seconds, 3),
        "student_updates": total,
        "epochs": total / batches.per_epoch,
        "images_seen": total * batches.batch_rows,
        "train_images": len(batches.label_of),
        "train_classes": batches.classes,
        "final_losses": mean_losses(read_metrics(run / "metrics.jsonl"), after=total - batches.per_epoch),
    }

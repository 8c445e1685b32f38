"""The training loop: batches from the cache, one method, Adam with cosine annealing, exact resume."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from cache_schema.devices import sound_gradients
from trainer.config import TrainConfig
from trainer.data.batches import iterate
from trainer.data.feed import Feed
from trainer.device import decide_precision
from trainer.evaluation.evaluate import evaluate_modules
from trainer.methods.method import Moment
from trainer.methods.registry import mode_name
from trainer.runs import LOG, read_metrics
from trainer.training.assembly import Parts, assemble, start
from trainer.training.checkpoint import save_checkpoint
from trainer.training.divergence import diverged, refuse_broken
from trainer.training.interrupts import DeferredInterrupt
from trainer.training.logs import MetricsLog, mean_losses
from trainer.training.optim import learning_rate
from trainer.training.run_folder import finish_run, prepare_run
from trainer.training.step import LossNotFiniteError, train_step

if TYPE_CHECKING:
    from cache_schema import Cache


def train(
    config: TrainConfig, cache: Cache, run: Path, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Train one student into `run`; returns what `result.json` holds.

    `resume` continues a run of the same config from its last checkpoint, and starts one where there is none;
    `overwrite` replaces whatever run is there. The directory is touched only once everything the run needs is
    known to be there. After Ctrl-C or SIGTERM the update in progress is finished and saved, then KeyboardInterrupt
    is raised. Raises TrainError for anything that cannot be trained on.
    """
    parts = assemble(config, cache)
    batches, total = parts.batches, parts.updates
    prepare_run(run, config, resume, overwrite)
    progress = start(parts, run, resume)
    began = time.monotonic() - progress.seconds
    with (
        sound_gradients(),
        MetricsLog(run / LOG, keep=progress.update) as log,
        closing(iterate(batches, progress.update, total, batches.workers)) as stream,
        tqdm(total=total, initial=progress.update, desc=config.method, unit="update", mininterval=0.5) as bar,
        DeferredInterrupt() as interrupt,
    ):
        feed = Feed(stream, parts.device, parts.feature_dtype, batches.reclaim)
        done = progress.update
        for batch in feed:
            update, done = done, done + 1
            rate = learning_rate(update, total, config.optim)
            moment = Moment(update, total)
            try:
                losses = train_step(parts.method, parts.optimizer, batch, rate, config, moment)
            except LossNotFiniteError as error:
                raise diverged(parts, run, update, error.losses) from None
            del batch  # its memory is for the next one
            if parts.average is not None:
                parts.average.update(parts.method, done)
            epoch, epoch_ends = done / batches.per_epoch, done % batches.per_epoch == 0
            bar.update()
            if done % config.log_every == 0 or done == total:
                values = {name: value.item() for name, value in losses.items()}
                seen = (done - progress.update) * batches.batch_rows
                speed = seen / (time.monotonic() - began - progress.seconds)
                log.write(update=done, epoch=round(epoch, 4), lr=rate, losses=values, images_per_second=speed)
                bar.set_postfix(epoch=f"{epoch:.1f}", loss=f"{values['loss']:.3f}", refresh=False)
            if done == total:
                break
            measured = epoch_ends and _due(epoch, config.eval_every)
            saved = interrupt.requested or (epoch_ends and _due(epoch, config.checkpoint_every))
            if measured or saved:
                refuse_broken(parts, run, done)  # so the last checkpoint is a good one
            if measured:
                scores = _evaluate(parts)
                log.write(update=done, epoch=epoch, eval=scores)
                parts.method.validated(scores)
            if saved:
                now = replace(progress, update=done, seconds=time.monotonic() - began)
                save_checkpoint(run, parts.method, parts.optimizer, now, parts.average)
            if interrupt.requested:
                raise KeyboardInterrupt
    refuse_broken(parts, run, total)
    result = _describe(parts, run, time.monotonic() - began)
    finish_run(run, parts.result, result)
    return result


def _due(epoch: float, every: int) -> bool:
    return every > 0 and round(epoch) % every == 0


def _evaluate(parts: Parts) -> dict[str, Any]:
    assert parts.validation is not None
    # Compiled for the shapes and the mode of training: another compilation would take longer than it saves.
    with torch.compiler.set_stance("force_eager"):
        return evaluate_modules(parts.result.student, parts.validation, parts.device, parts.result)[0]


def _describe(parts: Parts, run: Path, seconds: float) -> dict[str, Any]:
    batches, total = parts.batches, parts.updates
    return {
        **({"validation": _evaluate(parts)} if parts.validation else {}),
        "validation_classes": batches.validation.classes,
        "method": parts.config.method,
        "mode": mode_name(parts.config.method),
        "seed": parts.config.seed,
        "precision": decide_precision(parts.config.precision, parts.device, parts.method.student),
        "cache_id": parts.cache.manifest.cache_id,
        "seconds": round(seconds, 3),
        "student_updates": total,
        "epochs": total / batches.per_epoch,
        "images_seen": total * batches.batch_rows,
        "train_images": len(batches.label_of),
        "train_classes": batches.classes,
        "final_losses": mean_losses(read_metrics(run / LOG), after=total - batches.per_epoch),
    }

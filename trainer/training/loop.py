"""The training loop: batches from the cache, one method, Adam with cosine annealing, exact resume."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from cache_schema.devices import sound_gradients
from trainer.config import TrainConfig
from trainer.data.batches import Batch, iterate
from trainer.data.feed import Feed
from trainer.evaluation.evaluate import evaluate_modules
from trainer.methods.method import Moment
from trainer.training.assembly import Parts, assemble, start
from trainer.training.checkpoint import Best, Progress, save_checkpoint
from trainer.training.divergence import diverged, refuse_broken
from trainer.training.interrupts import DeferredInterrupt
from trainer.training.logs import MetricsLog
from trainer.training.optim import learning_rate
from trainer.training.pace import Pace
from trainer.training.run_folder import finish_run, prepare_run
from trainer.training.step import LossNotFiniteError, train_step
from trainer.training.summary import describe

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
    with (
        sound_gradients(),
        MetricsLog(run, keep=progress.update) as log,
        closing(iterate(batches, progress.update, total, batches.workers)) as stream,
        tqdm(total=total, initial=progress.update, desc=config.method, unit="update", mininterval=0.5) as bar,
        DeferredInterrupt() as interrupt,
    ):
        feed = Feed(stream, parts.device, parts.feature_dtype, batches.reclaim)
        course = _Course(parts, run, log, progress, Pace(feed, progress.timed))
        for batch in feed:
            losses = course.step(batch)
            del batch  # its memory is for the next one
            bar.update()
            if course.done % config.log_every == 0 or course.done == total:
                bar.set_postfix(course.report(losses), refresh=False)
            if course.done == total:
                break
            course.keep(interrupt.requested)
            if interrupt.requested:
                raise KeyboardInterrupt
    return course.finish()


class _Course:
    """A run under way: what is done with each batch, and what is written on the way and at the end."""

    def __init__(self, parts: Parts, run: Path, log: MetricsLog, progress: Progress, pace: Pace):
        self.parts, self.run, self.log, self.pace = parts, run, log, pace
        self.progress, self.done, self.best = progress, progress.update, progress.best
        self.began = time.monotonic() - progress.seconds

    @property
    def epoch(self) -> float:
        return self.done / self.parts.batches.per_epoch

    @property
    def rate(self) -> float:
        """The learning rate of the last update."""
        return learning_rate(self.done - 1, self.parts.updates, self.parts.config.optim)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update; returns its losses, which a device may still be computing."""
        self.pace.begin()
        parts, moment = self.parts, Moment(self.done, self.parts.updates)
        self.done += 1
        try:
            losses = train_step(parts.method, parts.optimizer, batch, self.rate, parts.config, moment)
        except LossNotFiniteError as error:
            raise diverged(parts, self.run, moment.update, error.losses) from None
        if parts.average is not None:
            parts.average.update(parts.method, self.done)
        self.pace.end()
        return losses

    def report(self, losses: dict[str, Tensor]) -> dict[str, str]:
        """Log the last update and the pace since the last report; returns what a progress bar shows of it."""
        values = {name: value.item() for name, value in losses.items()}
        rates = self.pace.lap().rates(self.parts.batches.batch_rows)
        self.log.write(self.done, epoch=round(self.epoch, 4), lr=self.rate, losses=values, **rates)
        shown = {"epoch": f"{self.epoch:.1f}", "loss": f"{values['loss']:.3f}", "lr": f"{self.rate:.1e}"}
        return {**shown, "images/s": f"{rates['images_per_second']:.0f}", "data wait": f"{rates['data_wait']:.0%}"}

    def keep(self, interrupted: bool) -> None:
        """Measure and save what is due after this update."""
        config, ends = self.parts.config, self.done % self.parts.batches.per_epoch == 0
        measured = ends and _due(self.epoch, config.eval_every)
        saved = interrupted or (ends and _due(self.epoch, config.checkpoint_every))
        if not measured and not saved:
            return
        refuse_broken(self.parts, self.run, self.done)  # so the last checkpoint is a good one
        with self.pace.stopped():
            if measured:
                self.parts.method.validated(self._measure())
            if saved:
                now = replace(self.progress, update=self.done, seconds=self._seconds())
                now = replace(now, timed=self.pace.whole, best=self.best)
                save_checkpoint(self.run, self.parts.method, self.parts.optimizer, now, self.parts.average)

    def finish(self) -> dict[str, Any]:
        """Write what is kept of the run; returns its result."""
        refuse_broken(self.parts, self.run, self.done)
        timing, scores = self.pace.whole, {}
        if self.parts.validation is not None:
            scores = {"validation": self._score()}
            self._note(scores["validation"])
        if self.best is not None:
            scores["best"] = asdict(self.best)
        result = describe(self.parts, self.run, self._seconds(), timing, scores)
        finish_run(self.run, self.parts.result, result)
        return result

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _measure(self) -> dict[str, Any]:
        scores = self._score()
        self.log.write(self.done, epoch=self.epoch, eval=scores)
        self._note(scores)
        return scores

    def _score(self) -> dict[str, Any]:
        parts = self.parts
        assert parts.validation is not None
        # Compiled for the shapes and the mode of training: another compilation would take longer than it saves.
        with torch.compiler.set_stance("force_eager"):
            return evaluate_modules(parts.result.student, parts.validation, parts.device, parts.result)[0]

    def _note(self, scores: dict[str, Any]) -> None:
        recall = scores["student"]["recall_at_1"]
        if self.best is None or recall > self.best.recall_at_1:
            self.best = Best(recall, self.done)


def _due(epoch: float, every: int) -> bool:
    return every > 0 and round(epoch) % every == 0

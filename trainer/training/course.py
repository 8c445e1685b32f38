"""A run under way: what is measured, written and kept of it, on the way and at the end."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import processes
from trainer.evaluation.evaluate import evaluate_modules
from trainer.evaluation.tables import headline
from trainer.training.assembly import Parts
from trainer.training.best import Best, best_so_far, keep_best
from trainer.training.checkpoint import Progress, save_checkpoint
from trainer.training.divergence import refuse_broken
from trainer.training.logs import MetricsLog, NoLog
from trainer.training.pace import Pace
from trainer.training.summary import describe


class Course:
    """A run under way: what is done with each batch, and what is written on the way and at the end."""

    def __init__(self, parts: Parts, run: Path, log: MetricsLog | NoLog, progress: Progress, pace: Pace):
        self.parts, self.run, self.log, self.pace = parts, run, log, pace
        self.progress, self.done, self.best = progress, progress.update, best_so_far(run) if processes.leads() else None
        self.began = time.monotonic() - progress.seconds
        self.rate = 0.0  # the learning rate of the last update

    @property
    def epoch(self) -> float:
        return self.done / self.parts.batches.per_epoch

    def report(self, losses: dict[str, Tensor]) -> dict[str, str]:
        """Log the last update and the pace since the last report; returns what a progress bar shows of it."""
        means = processes.summed(torch.stack([value.float() for value in losses.values()])) / processes.count()
        values = dict(zip(losses, means.tolist(), strict=True))
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
            if saved and processes.leads():
                self.save()
            processes.wait_for_all()  # or one that is interrupted would have the others ended before it is saved

    def result(self) -> dict[str, Any]:
        """What `result.json` holds of the run, at its end."""
        refuse_broken(self.parts, self.run, self.done)
        scores = {}
        if self.parts.validation is not None:
            scores = {"validation": self._score()}
            self._note(scores["validation"])
        return self._describe(scores)

    def save(self) -> None:
        """Save what the run has come to."""
        parts, batches = self.parts, self.parts.batches
        now = replace(
            self.progress,
            update=self.done,
            seconds=self._seconds(),
            timed=self.pace.whole,
            classes=batches.classes,
            images=self.done * batches.batch_rows,
            fit=parts.method.student.fit,
        )
        save_checkpoint(self.run, parts.method, parts.optimizer, now, parts.average, parts.config.keep_checkpoints)

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
        scores: dict[str, Any] = {}
        if processes.leads():
            with torch.compiler.set_stance("force_eager"), processes.alone():
                scores = evaluate_modules(parts.result.student, parts.validation, parts.device, parts.result)[0]
        return processes.told_by_leader(scores)

    def _note(self, scores: dict[str, Any]) -> None:
        """Remember a score if it is the best; where recall is followed on the way, with the weights that had it."""
        self._compare(scores)
        recall = headline(scores)["recall_at_1"]
        if self.best is None or recall > self.best.recall_at_1:
            self.best = Best(recall, self.done)
            if self.parts.config.eval_every and processes.leads():
                keep_best(self.run, self.parts.result, self.parts.config, self._describe({"validation": scores}))

    def _compare(self, scores: dict[str, Any]) -> None:
        """Say how the student does beside the run that it is held against, where it is."""
        if self.parts.rival is None or not processes.leads():
            return
        remark = self.parts.rival.remark(self.done, scores["student"]["recall_at_1"])
        if remark:
            print(f"\n{remark}", file=sys.stderr)  # below the bar of progress

    def _describe(self, scores: dict[str, Any]) -> dict[str, Any]:
        best = {} if self.best is None else {"best": asdict(self.best)}
        return describe(self.parts, self.run, self.done, self._seconds(), self.pace.whole, {**scores, **best})


def _due(epoch: float, every: int) -> bool:
    return every > 0 and round(epoch) % every == 0

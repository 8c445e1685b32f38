"""The training loop: batches from the cache, one method, Adam with cosine annealing, exact resume."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm import tqdm

from cache_schema.devices import sound_gradients
from cache_schema.interrupts import DeferredInterrupt
from trainer import processes
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.data.batches import iterate
from trainer.data.feed import Feed
from trainer.methods.method import Moment
from trainer.training.assembly import assemble, start, worth_before
from trainer.training.course import Course
from trainer.training.distributed import wrap
from trainer.training.divergence import diverged
from trainer.training.logs import open_log
from trainer.training.optim import learning_rate
from trainer.training.pace import Pace
from trainer.training.run_folder import finish_run, note_caches, prepare_run
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
    parts = assemble(config, cache, worth_before(run) if resume else None)
    batches, total = parts.batches, parts.updates
    processes.wait_for_all()  # until none looks any more at what is there
    if processes.leads():
        prepare_run(run, config, resume, overwrite)
        note_caches(run, cache.manifest.cache_id, parts.other_caches)
    processes.wait_for_all()
    progress = start(parts, run, resume)
    wrapped = wrap(parts.method, parts.device)
    interrupt = DeferredInterrupt()

    def gives_up() -> bool:
        # One of several processes has to make the update that the others make.
        return interrupt.requested and processes.count() == 1

    with (
        sound_gradients(),
        open_log(run, config, progress.update) as log,
        closing(iterate(batches, progress.update, total, batches.workers, gives_up)) as stream,
        tqdm(
            total=total,
            initial=progress.update,
            desc=config.method,
            unit="update",
            mininterval=0.5,
            disable=not processes.leads(),
        ) as bar,
        interrupt,
    ):
        feed = Feed(stream, parts.device, parts.feature_dtype, batches.reclaim)
        course = Course(parts, run, log, progress, Pace(feed, progress.timed))
        for batch in feed:
            losses = _step(course, batch, wrapped)
            del batch  # its memory is for the next one
            bar.update()
            if course.done % config.log_every == 0 or course.done == total:
                bar.set_postfix(course.report(losses), refresh=False)
            if course.done == total:
                break
            stopping = processes.any_of(interrupt.requested, parts.device)
            course.keep(stopping)
            if stopping:
                raise KeyboardInterrupt
        if course.done < total:
            course.save()  # no batch came, of a server that died, say
            raise KeyboardInterrupt
    result = course.result()
    if processes.leads():
        finish_run(run, parts.result, result)
    processes.wait_for_all()
    return result


def _step(course: Course, batch: Batch, wrapped: nn.Module | None) -> dict[str, Tensor]:
    """One update; returns its losses, which a device may still be computing."""
    parts, moment = course.parts, Moment(course.done, course.parts.updates)
    course.pace.begin()
    course.rate = learning_rate(moment.update, moment.total, parts.config.optim)
    course.done += 1
    together = {} if wrapped is None else {"wrapped": wrapped}
    try:
        losses = train_step(parts.method, parts.optimizer, batch, course.rate, parts.config, moment, **together)
    except LossNotFiniteError as error:
        raise diverged(parts, course.run, moment.update, error.losses) from None
    if parts.average is not None:
        parts.average.update(parts.method, course.done)
    course.pace.end()
    return losses

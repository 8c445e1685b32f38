"""What a run is made of, put together from its config and its cache, at its beginning or where it stopped."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.utils import ModelEmaV3

from trainer import processes
from trainer.config import ALONE, TrainConfig
from trainer.data.batches import TrainingBatches
from trainer.data.images import choose_fit
from trainer.data.memory import spare_memory
from trainer.device import (
    choose_device,
    feature_dtype,
    resumes_exactly,
    set_deterministic,
    use_device,
    watch_memory,
)
from trainer.errors import TrainError
from trainer.evaluation.embed import TestSplit, feature_sources, open_rows
from trainer.evaluation.worth import Worth, measure_worth
from trainer.methods.method import Method
from trainer.methods.registry import find_method
from trainer.methods.settings import without_teacher
from trainer.methods.teacher_config import FollowingConfig
from trainer.models.student import Student, build_student
from trainer.training.checkpoint import Progress, latest_checkpoint, load_checkpoint, read_progress, resuming
from trainer.training.distributed import join, synchronise_batch_norm
from trainer.training.optim import make_optimizer
from trainer.training.rival import Rival, open_rival
from trainer.training.trackers import check_trackers

if TYPE_CHECKING:
    from cache_schema import Cache

FIT_UPDATES = 8  # batches that a method may look at before the first update


@dataclass(frozen=True)
class Parts:
    """What a run is made of, once its config and its cache have been found to fit."""

    config: TrainConfig  # that of the student alone, where a teacher is not worth following
    cache: Cache
    device: torch.device
    batches: TrainingBatches
    validation: TestSplit | None  # the classes held out, where there are any
    method: Method
    optimizer: torch.optim.Optimizer
    average: ModelEmaV3 | None  # of the method's weights, where the config asks for one
    rival: Rival | None  # the run that this one is held against, where there is one
    asked: str  # the method asked for, that of `config` unless its teacher is not worth following
    worth: Worth | None  # of the teacher, where that decides

    @property
    def updates(self) -> int:
        return self.config.updates or self.config.epochs * self.batches.per_epoch

    @property
    def feature_dtype(self) -> torch.dtype:
        """What features are decoded to for training: what the forward pass reads them in, if that is exact enough."""
        if self.batches.exact:
            return torch.float32
        return feature_dtype(self.config.precision, self.device, self.method.student)

    @property
    def other_caches(self) -> dict[str, str]:
        """Ids of the caches that are read beside the run's own, by the method's names of what is read."""
        found = self.batches.sources.items()
        return {name: s.cache.manifest.cache_id for name, s in found if s.cache is not self.cache}

    @property
    def result(self) -> Method:
        """The method with the weights that are evaluated and kept: the averaged ones, where there are any."""
        return self.method if self.average is None else self.average.module


def assemble(config: TrainConfig, cache: Cache, worth: Worth | None = None) -> Parts:
    """Build the student, the method around it and all else; raises TrainError for what does not fit.

    worth: of the teacher, where it is known from before an interruption.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    named = use_device(device)
    watch_memory(device)
    join(device)
    check_trackers(config.track)
    set_deterministic(config.deterministic)
    torch.manual_seed(config.seed)
    student = build_student(config.student)
    _say_if_enlarged(config, cache, student)
    student.fit = choose_fit(config.fit, cache)
    batches = _open_batches(config, cache, student, device)
    if worth is None and isinstance(config, FollowingConfig) and config.follow == "auto":
        worth = _weigh(batches, student, device)
    asked = config.method
    if worth is not None and not worth.followed:
        config = without_teacher(config)
        batches = _open_batches(config, cache, student, device)
    kind = find_method(config.method)
    print(f"{named}; {_loading(batches)}")
    if device.type == "cuda":
        batches.pin_memory()
    if config.eval_every and not config.validation_classes:
        raise TrainError(
            "eval_every: recall is followed on classes held out of the training split; add --validation-classes 0.2"
        )
    rival = open_rival(config)  # what is wrong with it is said before the first update
    validation = None
    if config.validation_classes:
        validation = open_rows(
            cache, batches.validation, student.input_size, _image_memory(batches), student.fit, batches.sources
        )
    batches.require_parts(config.optim.accumulate * processes.count())
    synchronise_batch_norm(student, device)
    shapes = {name: source.shape for name, source in batches.sources.items()}
    method = kind(config, student, batches.classes, shapes).to(device)
    # Of the method and not of the student alone: what is used with the student must be of the same moments. The decay
    # grows with the updates, or short runs would end in a mean with their random beginning.
    average = ModelEmaV3(method, decay=config.optim.ema, use_warmup=True) if config.optim.ema else None
    optimizer = make_optimizer(method, config.optim)
    if config.compile:
        student.compile_network()  # after the average was copied: that one only evaluates
    parts = Parts(config, cache, device, batches, validation, method, optimizer, average, rival, asked, worth)
    _check_measurements(parts)
    return parts


def _open_batches(config: TrainConfig, cache: Cache, student: Student, device: torch.device) -> TrainingBatches:
    needs = find_method(config.method).needs(config)
    return TrainingBatches(cache, config, student.input_size, needs, student.fit, device)


def _weigh(batches: TrainingBatches, student: Student, device: torch.device) -> Worth | None:
    """What the teacher is worth to the student as it starts, by the first features that the method reads.

    Source: a teacher that knows less than its student can hold it back, as in Cho & Hariharan, "On the Efficacy of
    Knowledge Distillation", ICCV 2019, and where it does was measured: "Stanford Cars with the demo teacher" in
    benchmarks/README.md.
    """
    worth: Worth | None = None
    if processes.leads():
        seen = TestSplit(batches.cache, batches.training, batches.images)
        source = next(iter(batches.sources.values()))
        with processes.alone():
            worth = measure_worth(student.to(device), source, seen, device)
    worth = processes.told_by_leader(worth)
    if worth is None:
        print("note: follow=auto: features in the canonical view are lacking to look images up by; it is followed")
    elif worth.followed:
        print(worth)
    else:
        print(
            f"warning: {worth}: it would hold the student back and is not followed, the run is that of method {ALONE}; "
            "--follow always follows it all the same",
            file=sys.stderr,
        )
    return worth


def _check_measurements(parts: Parts) -> None:
    """Raise TrainError where what is to go by recall on the way would never see any, or that of other classes."""
    batches, waits = parts.batches, parts.method.waits_for_scores
    every = parts.config.eval_every * batches.per_epoch
    on_the_way = range(every, parts.updates, every) if every else range(0)
    if parts.rival is not None:
        parts.rival.require_same((batches.classes, batches.validation.classes), [*on_the_way, parts.updates])
    if waits is None or parts.validation is None:
        return
    if not on_the_way:
        raise TrainError(
            f"{waits}: scores on validation classes would first come after {every} updates, and the run ends after "
            f"{parts.updates}; lower --eval-every, or train longer"
        )
    if feature_sources(parts.method, parts.validation) is None:
        raise TrainError(
            f"{waits}: not all images of the validation classes have features in the canonical view to be scored with; "
            "build the cache with it"
        )


def _image_memory(batches: TrainingBatches) -> float:
    """The gigabytes that decoded images of held-out classes may take: what those trained on leave of the limit."""
    given = batches.config.image_memory_gb
    limit = spare_memory() / 1e9 if given is None else given  # no page of what is kept was touched yet
    return max(0.0, limit - batches.images.kept_bytes / 1e9)


def _loading(batches: TrainingBatches) -> str:
    """Who makes the batches, for the header of a run, and what they will decode again and again."""
    who = f"{batches.workers} loader processes" if batches.workers > 1 else "one loader process"
    who = who if batches.workers else "batches made by threads of this process"
    kept, of = batches.images.kept, len(batches.all_rows)
    return who if kept == of else f"{who}; {kept} of {of} decoded images fit in memory, the others are decoded anew"


def _say_if_enlarged(config: TrainConfig, cache: Cache, student: Student) -> None:
    """Images smaller than what the network takes by itself are stretched, which costs time: that is said."""
    images = cache.manifest.images
    if config.student.img_size is None and images is not None and images.size < student.input_size:
        print(
            f"note: the cache's images of {images.size} pixels are enlarged to {student.input_size}, the size of "
            f"{student.name}; --image-size {images.size} trains on them as they are",
            file=sys.stderr,
        )


def worth_before(run: Path) -> Worth | None:
    """What an interrupted run had found of its teacher, where it had looked."""
    checkpoint = latest_checkpoint(run)
    if checkpoint is None:
        return None
    with resuming(checkpoint):
        return read_progress(checkpoint).worth


def start(parts: Parts, run: Path, resume: bool) -> Progress:
    """Restore the last checkpoint, or begin at update 0."""
    batches = parts.batches
    beginning = Progress(
        0,
        0.0,
        parts.cache.manifest.cache_id,
        parts.other_caches,
        classes=batches.classes,
        held_out=batches.validation.classes,
        rows=batches.digest,
        worth=parts.worth,
    )
    checkpoint = latest_checkpoint(run) if resume else None
    if checkpoint is None:
        if batches.fit_on == "all":
            of = f"{len(batches.all_rows)} images in {len(batches.views)} views"
            print(f"measuring the features of {of} before the first update")
        parts.method.fit(batches.fitting(FIT_UPDATES).to(parts.device))
        return beginning
    if not resumes_exactly(parts.device, parts.config.deterministic):
        print(f"note: on {parts.device} the run goes on with other last bits; with --deterministic it would not")
    with resuming(checkpoint):
        progress = read_progress(checkpoint)
    # Before its weights are read: those of other classes would not fit, and no more would be said.
    _refuse_another(run, progress, beginning, parts.cache.manifest.label)
    load_checkpoint(checkpoint, parts.method, parts.optimizer, parts.device, parts.average)
    return replace(progress, held_out=beginning.held_out, rows=beginning.rows)


def _refuse_another(run: Path, progress: Progress, now: Progress, label: str) -> None:
    """Raise TrainError unless a run was, as far as its checkpoint says, on the same caches and the same rows."""
    if progress.cache_id != now.cache_id:
        trained_on = f"cache {progress.cache_id[:8]}, not on {label}"
        raise TrainError(f"{run} was trained on {trained_on}: give that cache, or start anew with --overwrite")
    changed = [name for name, cache_id in progress.other_caches.items() if now.other_caches.get(name) != cache_id]
    if changed:
        raise TrainError(f"{run} read {changed[0]} from another cache: give that one, or start anew with --overwrite")
    if progress.rows not in ("", now.rows) or progress.classes not in (0, now.classes):
        raise TrainError(
            f"{run} was trained on other rows of cache {label} than have features now: it has grown, and going on "
            "would be another run; start anew with --overwrite"
        )

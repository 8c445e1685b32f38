"""Batches from a cache: images, labels and teacher features of the same rows in the same views."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cache_schema.errors import LoaderError
from cache_schema.loading.dataset import CacheDataset, FeatureBatch
from cache_schema.loading.pool import TensorPool
from cache_schema.loading.sampler import AUGMENT, VIEWS, BalancedSampler, EpochSampler, StreamSampler, generator
from cache_schema.loading.side_by_side import AT_ONCE, reading_ahead
from cache_schema.read_ahead import PREFETCH
from trainer import processes
from trainer.config import TrainConfig
from trainer.data.augmentation import augment_image, draw_numbers
from trainer.data.batch import IMAGES, Batch
from trainer.data.crops import CropViews
from trainer.data.features import (
    WHOLE_VIEWS,
    FeatureSource,
    Needs,
    open_sources,
    sample_ids,
    shared_views,
    some_of,
)
from trainer.data.images import Fit, ImageStore
from trainer.data.memory import spare_memory
from trainer.data.regions import Regions
from trainer.data.splits import Split, hold_out_classes, select_split
from trainer.data.timesteps import TimestepDraw
from trainer.data.unlabelled import other_views, unlabelled_rows
from trainer.device import choose_workers
from trainer.errors import SharedError, TrainError

if TYPE_CHECKING:
    from cache_schema import Cache

_CPU = torch.device("cpu")
_SPARE = 4  # batches in memory beyond those read ahead: being taken, waited for, copied, and trained on


class TrainingBatches:
    """`batches[update]` is the whole batch of that update: a pure function, the same in any process."""

    def __init__(
        self,
        cache: Cache,
        config: TrainConfig,
        image_size: int,
        needs: Needs,
        fit: Fit = "squash",
        device: torch.device = _CPU,
    ):
        self.cache, self.config = cache, config
        self.share = processes.number(), processes.count()  # which part of every batch, of how many
        self.sources = open_sources(cache, needs)
        self.views = shared_views(cache, self.sources, config.views)
        if config.augment.flip and "hflip" not in self.views:
            self.views = (*self.views, "hflip")
        # Whatever a method reads, it keeps to the rows with features: all methods train on the same images.
        whole = select_split(cache, "train", need_features=True)
        if not len(whole.rows):
            raise TrainError(f"cache {cache.manifest.label} has no train rows with features")
        split, self.validation = hold_out_classes(whole, config.validation_classes)
        self.training = split  # the labelled rows
        self.classes = split.classes
        self.label_of = dict(zip(split.rows.tolist(), split.labels.tolist(), strict=True))
        self.labelled = _labelled(split, config)
        rows = split.rows
        self.fit_on, self.exact = needs.fit_on, needs.exact
        self.unlabelled: StreamSampler | None = None
        if needs.unlabelled:
            extra = unlabelled_rows(cache, needs, split.rows, self.views)
            self.unlabelled = StreamSampler(extra, needs.unlabelled, config.seed)
            rows = np.union1d(rows, extra)
        for source in self.sources.values():
            source.require(cache, rows)
        self.all_rows = np.sort(rows)
        self.crops = CropViews(cache, self.views)
        cropped = config.augment.crop_scale is not None or bool(self.crops)
        self.images = ImageStore(cache, image_size, rows, config.image_memory_gb, fit, as_stored=cropped)
        self.regions = Regions(cache, self.sources, self.views) if needs.places else None
        self.timesteps = TimestepDraw.of(self.sources.values(), needs.timesteps_per_step, config.seed)
        self.workers = self._affordable(choose_workers(config.workers, device))
        self.slots = read_ahead_depth(self.workers) + _SPARE
        self.pixels = TensorPool({IMAGES: ((self.batch_rows, 3, image_size, image_size), torch.uint8)}, self.slots)
        self.features = {name: _SourceReader(source, self) for name, source in self.sources.items()}

    def _affordable(self, workers: int) -> int:
        """So many loader processes or, where they were not asked for, as many as there is memory to read ahead in."""
        batch = 3 * self.images.size**2 * self.batch_rows + self.feature_bytes
        if self.config.workers == "auto":
            while workers > 1 and (read_ahead_depth(workers) + _SPARE) * batch > spare_memory():
                workers -= 1
        return workers

    @property
    def feature_bytes(self) -> int:
        """Bytes of encoded features in the whole batch of an update, without their scales."""
        each = None if self.timesteps is None else self.timesteps.each
        return self.batch_rows * sum(source.row_bytes(each) for source in self.sources.values())

    @property
    def caches(self) -> list[Cache]:
        """All caches that batches are read from."""
        return [self.cache, *(source.cache for source in self.sources.values())]

    @property
    def digest(self) -> str:
        """Tells apart runs on other rows: those with a label, all that are trained on, those of classes held out."""
        rows = [sorted(self.label_of), self.all_rows.tolist(), self.validation.rows.tolist()]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def per_epoch(self) -> int:
        """Updates in an epoch."""
        return self.labelled.batches_per_epoch

    def require_parts(self, parts: int) -> None:
        """Raise TrainError unless labelled and unlabelled rows of a batch can be cut into so many equal parts."""
        for rows, name in ((self.labelled, "labelled"), (self.unlabelled, "unlabelled")):
            if rows is not None and rows.batch_size % parts:
                whose = "optim.accumulate" if self.share[1] == 1 else f"{self.share[1]} processes, optim.accumulate"
                raise TrainError(f"{whose}: {rows.batch_size} {name} images per update are not {parts} equal parts")

    @property
    def batch_rows(self) -> int:
        """Rows of a batch, labelled and not."""
        return self.labelled.batch_size + (self.unlabelled.batch_size if self.unlabelled else 0)

    def rows(self, update: int) -> np.ndarray:
        """Rows of the cache in this process's batch of 0-based `update`: the labelled ones, then the unlabelled ones.

        Of several processes that train together each has its share of both.
        """
        return self.rows_of_all(update)[self._own()]

    def rows_of_all(self, update: int) -> np.ndarray:
        """Rows of the whole batch of an update, whichever process has them."""
        labelled = self.labelled.batch(update)
        return labelled if self.unlabelled is None else np.append(labelled, self.unlabelled.batch(update))

    def _own(self) -> np.ndarray:
        """Where this process's share is in the rows of a whole batch."""
        (part, parts), first = self.share, self.labelled.batch_size
        places = [np.arange(first * part // parts, first * (part + 1) // parts)]
        if self.unlabelled is not None:
            extra = self.unlabelled.batch_size
            places.append(first + np.arange(extra * part // parts, extra * (part + 1) // parts))
        return np.concatenate(places)

    def _draw_views(self, update: int, rows: np.ndarray) -> np.ndarray:
        """The view of every row of a whole batch, by its number."""
        labelled, random = self.labelled.batch_size, generator(self.config.seed, VIEWS, update)
        # Drawn for the labelled rows first: unlabelled rows do not change what a method without them sees.
        draw = random.integers(len(self.views), size=len(rows))
        if not np.isin(rows[labelled:], rows[:labelled]).any():
            return draw
        return other_views(rows, draw, labelled, len(self.views), random)

    def __getitem__(self, update: int) -> Batch:
        return self.make(update, self.timesteps, self._own())

    def make(self, update: int, timesteps: TimestepDraw | None, places: np.ndarray | None = None) -> Batch:
        """The batch of an update with the features of the timesteps drawn, or (None) of all.

        With `places` only these of its rows, as they are in the whole of it.
        """
        everyone = self.rows_of_all(update)
        whole = len(everyone)
        own = np.arange(whole) if places is None else places
        rows = everyone[own]
        labelled = int((own < self.labelled.batch_size).sum())
        labels = torch.full((len(rows),), -1, dtype=torch.int64)
        labels[:labelled] = torch.tensor([self.label_of[row] for row in rows[:labelled].tolist()])
        draw = self._draw_views(update, everyone)[own]
        held = self.pixels.take(len(rows))
        images = held.tensors[IMAGES]
        numbers = draw_numbers(generator(self.config.seed, AUGMENT, update), whole)[own]
        boxes = self._draw_images(images, rows, draw, numbers)
        drawn = None if timesteps is None else timesteps.draw(update, whole)[own]
        encoded = {name: reader.read(rows, draw, drawn) for name, reader in self.features.items()}
        chosen = None if drawn is None else torch.from_numpy(drawn)
        return Batch(images, labels, encoded, unlabelled=len(rows) - labelled, boxes=boxes, timesteps=chosen, held=held)

    def pin_memory(self) -> None:
        """Page-lock what batches are made in, for copies to a CUDA device that take no time of a step."""
        try:
            self.pixels.pin_memory()
            for reader in self.features.values():
                reader.reused.pin_memory()
        except LoaderError as error:
            print(f"note: batches are copied to the GPU more slowly: {error}", file=sys.stderr)

    def reclaim(self) -> None:
        """Let memory be used again that batches were copied to a CUDA device from."""
        self.pixels.reclaim()
        for reader in self.features.values():
            reader.reused.reclaim()

    def _draw_images(self, images: Tensor, rows: np.ndarray, views: np.ndarray, numbers: np.ndarray) -> Tensor | None:
        """Fill (n, 3, S, S) uint8 with the images of rows, each cropped, in its own of the run's views, and changed.

        Returns, where features are compared place by place, what each shows of the picture in its view: (n, 4).
        """
        augment = self.config.augment
        boxes = self.crops.show(images, self.images, rows, views, augment.crop_scale, numbers)
        for place, view in enumerate(views):
            if self.views[view] == "hflip":
                images[place] = images[place].flip(-1)
            if augment.changes_pixels:
                images[place] = augment_image(images[place], augment, numbers[place])
        if self.regions is None:
            return None
        mirrored = np.array([self.views[view] == "hflip" for view in views])
        return torch.from_numpy(self.regions.seen(rows, boxes, mirrored, views)).float()

    def fitting(self, few: int) -> FittingBatches:
        """What a method measures before the first update: the first `few` batches, or the features of every row."""
        return FittingBatches(self, few)


class FittingBatches:
    """Batches of all timesteps, read anew each time they are gone through, so that none of them stays in memory."""

    def __init__(self, batches: TrainingBatches, few: int, device: torch.device = _CPU):
        self.batches, self.few, self.device = batches, few, device

    def to(self, device: torch.device) -> FittingBatches:
        """The same, decoded on `device`."""
        return FittingBatches(self.batches, self.few, device)

    def __iter__(self) -> Iterator[Batch]:
        for rows, batch in self._read():
            decoded = batch.to(self.device)
            self._refuse_broken(rows, decoded)
            yield decoded

    def _read(self) -> Iterator[tuple[np.ndarray, Batch]]:
        batches = self.batches
        if batches.fit_on == "few":
            yield from ((batches.rows_of_all(update), batches.make(update, None)) for update in range(self.few))
            return
        for view in range(len(batches.views)):
            for start in range(0, len(batches.all_rows), batches.batch_rows):
                rows = batches.all_rows[start : start + batches.batch_rows]
                yield rows, self._features(rows, view)

    def _features(self, rows: np.ndarray, view: int) -> Batch:
        views = np.full(len(rows), view)
        encoded = {name: reader.read(rows, views) for name, reader in self.batches.features.items()}
        labels = torch.tensor([self.batches.label_of.get(row, -1) for row in rows.tolist()])
        return Batch(torch.empty(len(rows), 3, 0, 0, dtype=torch.uint8), labels, encoded)

    def _refuse_broken(self, rows: np.ndarray, batch: Batch) -> None:
        """Raise TrainError for features that are not finite: no mean or direction could be measured by them."""
        found = batch.broken_features()
        if found is not None:
            name, broken = found
            samples = some_of(sample_ids(self.batches.cache, rows[broken]))
            advice = self.batches.sources[name].how_to_check
            raise SharedError(f"the cached features {name!r} of {samples} are not finite; {advice}")


class _SourceReader:
    """One source's features as encoded batches, in memory that is used again."""

    def __init__(self, source: FeatureSource, batches: TrainingBatches):
        self.source = source
        # A mirrored image has unmirrored features only where the cache has no others.
        has = source.cache.manifest.views
        lacking = [view for view in batches.views if view not in has]
        if lacking and "canonical" not in has:
            raise TrainError(
                f"cache {source.cache.manifest.label} lacks view {lacking[0]}, and the canonical one in its place: "
                "build it with --views canonical,hflip, or set augment.flip=false"
            )
        self.view_index = np.array([has.index(view if view in has else "canonical") for view in batches.views])
        if source.next_view and len(set(self.view_index.tolist())) < 2:
            raise TrainError(
                f"cache {source.cache.manifest.label} has one view to train on, {batches.views[0]}: there is no other "
                "to take a mean with; build it with --views canonical,hflip, or use loss.target_views=own"
            )
        if source.next_view and batches.crops:
            raise TrainError(
                "loss.target_views=mean would mix features of a crop into those of the whole image: train on "
                f"views={','.join(WHOLE_VIEWS)}, or use loss.target_views=own"
            )
        cache, tap, timesteps = source.cache, source.tap, source.shape.timesteps
        draw, rows, slots = batches.timesteps, batches.batch_rows, batches.slots
        # Where timesteps are drawn, all of them are only read for what is measured before the first update.
        self.whole = CacheDataset(cache, tap, timesteps, batch_size=rows if draw is None else None, slots=slots)
        self.drawn = None if draw is None else CacheDataset(cache, tap, batch_size=rows, slots=slots, each=draw.each)

    @property
    def reused(self) -> CacheDataset:
        """Where the batches of training are read into, memory that is used again."""
        return self.whole if self.drawn is None else self.drawn

    def read(self, rows: np.ndarray, views: np.ndarray, drawn: np.ndarray | None = None) -> FeatureBatch:
        """Features of rows of the run's own cache, each in its own of the run's views, at the timesteps drawn."""
        if self.source.next_view:
            views = (views + 1) % len(self.view_index)
        rows, views = self.source.rows(rows), self.view_index[views]
        if drawn is None or self.drawn is None:
            return self.whole.read(rows, views)
        return self.drawn.read(rows, views, np.array(self.source.shape.timesteps)[drawn])


def iterate(
    batches: TrainingBatches, start: int, stop: int, workers: int, unless: Callable[[], bool] | None = None
) -> Generator[Batch, None, None]:
    """Yield batches start..stop-1 in order, made ahead of time by threads or by `workers` processes.

    unless: as of `ReadAhead.over`.
    """
    depth = read_ahead_depth(workers)
    with reading_ahead(batches.__getitem__, batches.caches, workers=workers, depth=depth, calm=PREFETCH) as ahead:
        yield from ahead.over(range(start, stop), unless)


def read_ahead_depth(workers: int) -> int:
    """How many batches are made ahead, at most: each may be as large as half a gigabyte, and page-locked."""
    return workers + PREFETCH if workers else AT_ONCE


def _labelled(split: Split, config: TrainConfig) -> EpochSampler | BalancedSampler:
    """Which labelled rows make up each batch; raises TrainError where there are too few classes to balance."""
    if config.sampler == "shuffled":
        return EpochSampler(split.rows, config.batch_size, config.seed)
    classes, each = config.balanced
    if classes > split.classes:
        raise TrainError(
            f"sampler balanced: {classes} classes per batch are more than the {split.classes} that are trained on; "
            "lower --classes-per-batch, or raise --images-per-class"
        )
    return BalancedSampler(split.rows, split.labels, classes, each, config.seed)

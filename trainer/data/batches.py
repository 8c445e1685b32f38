"""Batches from a cache: images, labels and teacher features of the same rows in the same views."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cache_schema.loading.dataset import CacheDataset, FeatureBatch
from cache_schema.loading.sampler import AUGMENT, VIEWS, EpochSampler, StreamSampler, generator
from cache_schema.read_ahead import ReadAhead
from trainer.config import TrainConfig
from trainer.data.images import ImageStore
from trainer.errors import TrainError

if TYPE_CHECKING:
    from cache_schema import Cache

PAIRED_VIEWS = ("canonical", "hflip")  # the views whose student image can be made from the stored one


@dataclass
class Batch:
    """B labelled rows, then U unlabelled ones. `features` are as encoded until `to` decodes them."""

    images: Tensor  # (B+U, 3, S, S) uint8
    labels: Tensor  # (B+U,) int64, -1 = unlabelled
    features: FeatureBatch | None = None
    tokens: Tensor | None = None  # (B+U, P, L, C_t) float32

    def to(self, device: torch.device) -> Batch:
        """Move to `device` and decode the features there: encoded bytes are the cheaper ones to move."""
        tokens = None if self.features is None else self.features.decode(device=device, dtype=torch.float32)
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device), None, tokens)


@dataclass(frozen=True)
class Split:
    """Rows of one split with their labels, mapped to 0..M-1 in the order of the cache's own label numbers."""

    rows: np.ndarray  # (n,) row numbers of the cache
    labels: np.ndarray  # (n,) int64
    classes: int  # M


def select_split(cache: Cache, split: str, need_features: bool) -> Split:
    """Rows of `split` in row order; quarantined rows and, where asked, rows without features are left out."""
    samples = cache.samples
    splits, states = samples["split"].to_pylist(), samples["state"].to_pylist()
    chosen = [
        row
        for row, (name, state) in enumerate(zip(splits, states, strict=True))
        if name == split and state == "ok" and (not need_features or cache.has_features(row))
    ]
    rows = np.array(chosen, dtype=np.int64)
    labels = samples["label"].to_numpy()[rows] if len(rows) else np.zeros(0, dtype=np.int64)
    names, dense = np.unique(labels, return_inverse=True)
    return Split(rows, dense.astype(np.int64), len(names))


def choose_timesteps(cache: Cache, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The run's timesteps: those asked for, or all; raises TrainError that says what the cache has."""
    have = tuple(cache.manifest.curriculum.timesteps)
    lacking = [t for t in wanted or () if t not in have]
    if lacking:
        raise TrainError(f"{_name(cache)} lacks timestep {_list(lacking)} (has {_list(have)})")
    return tuple(wanted) if wanted else have


def choose_views(cache: Cache, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The run's views: those asked for, or all that can be paired; raises TrainError that says what there is."""
    have = tuple(cache.manifest.views)
    lacking = [view for view in wanted or () if view not in have]
    if lacking:
        raise TrainError(f"{_name(cache)} lacks view {_list(lacking)} (has {_list(have)})")
    unpaired = [view for view in wanted or () if view not in PAIRED_VIEWS]
    if unpaired:
        raise TrainError(f"view {_list(unpaired)} cannot be paired with a student image; use {_list(PAIRED_VIEWS)}")
    views = tuple(wanted) if wanted else tuple(view for view in have if view in PAIRED_VIEWS)
    if not views:
        raise TrainError(f"{_name(cache)} has no view to train on (has {_list(have)})")
    return views


def token_shape(cache: Cache, tap: str, timesteps: tuple[int, ...]) -> tuple[int, int, int]:
    """(P, L, C_t) of a tap; raises TrainError that says which taps the cache has."""
    taps = {info.name: info for info in cache.manifest.taps}
    if tap not in taps:
        raise TrainError(f"{_name(cache)} lacks tap {tap} (has {_list(taps)})")
    return len(timesteps), taps[tap].tokens, taps[tap].channels


class TrainingBatches:
    """`batches[update]` is the whole batch of that update: a pure function, the same in any process."""

    def __init__(self, cache: Cache, config: TrainConfig, image_size: int):
        self.cache, self.config = cache, config
        self.timesteps = choose_timesteps(cache, config.timesteps)
        self.views = choose_views(cache, config.views)
        self.view_index = [cache.manifest.views.index(view) for view in self.views]
        self.distill = config.mode == "distill"
        self.token_shape = token_shape(cache, config.tap, self.timesteps)
        # The baseline keeps to the rows with features too: both modes train on the same images.
        split = select_split(cache, "train", need_features=True)
        if not len(split.rows):
            raise TrainError(f"{_name(cache)} has no train rows with features")
        self.classes = split.classes
        self.label_of = dict(zip(split.rows.tolist(), split.labels.tolist(), strict=True))
        self.labelled = EpochSampler(split.rows, config.batch_size, config.seed)
        rows = split.rows
        self.unlabelled: StreamSampler | None = None
        if self.distill and config.unlabeled_per_batch:
            extra = select_split(cache, "unlabeled", need_features=True).rows
            if not len(extra):
                raise TrainError(f"{_name(cache)} has no unlabeled rows with features; set unlabeled_per_batch=0")
            self.unlabelled = StreamSampler(extra, config.unlabeled_per_batch, config.seed)
            rows = np.concatenate([rows, extra])
        self.images = ImageStore(cache, image_size, rows, config.image_memory_gb)
        self.features: CacheDataset | None = None
        if self.distill:
            self.features = CacheDataset(cache, config.tap, self.timesteps, batch_size=self.batch_rows)

    @property
    def per_epoch(self) -> int:
        """Updates in an epoch."""
        return self.labelled.batches_per_epoch

    @property
    def batch_rows(self) -> int:
        """Rows of a batch, labelled and not."""
        return self.labelled.batch_size + (self.unlabelled.batch_size if self.unlabelled else 0)

    def __getitem__(self, update: int) -> Batch:
        labelled = self.labelled.batch(update)
        rows = labelled if self.unlabelled is None else np.append(labelled, self.unlabelled.batch(update))
        labels = torch.full((len(rows),), -1, dtype=torch.int64)
        labels[: len(labelled)] = torch.tensor([self.label_of[row] for row in labelled.tolist()])
        # Drawn for the labelled rows first: unlabelled rows do not change what the baseline sees.
        draw = generator(self.config.seed, VIEWS, update).integers(len(self.views), size=len(rows))
        images = self.images.load(rows)
        for place, view in enumerate(draw):
            if self.views[view] == "hflip":
                images[place] = images[place].flip(-1)
        if self.config.augment == "color":
            images = jitter_color(images, generator(self.config.seed, AUGMENT, update))
        features = None if self.features is None else self.features.read(rows, np.array(self.view_index)[draw])
        return Batch(images, labels, features)


def jitter_color(images: Tensor, random: np.random.Generator, strength: float = 0.3) -> Tensor:
    """Scale brightness, contrast and saturation of each image by 1 ± `strength`: (B, 3, S, S) uint8, same out."""
    draw = 1 + strength * (2 * random.random((len(images), 3)) - 1)
    brightness, contrast, saturation = torch.from_numpy(draw).float().view(-1, 3, 1, 1, 1).unbind(1)
    x = images.float() * brightness
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
    x = torch.lerp(x.mean(1, keepdim=True), x, saturation)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def iterate(batches: TrainingBatches, start: int, stop: int, workers: int) -> Generator[Batch, None, None]:
    """Yield batches start..stop-1 in order, made ahead of time by one thread or by `workers` processes."""
    with closing(ReadAhead(batches.__getitem__, workers, in_thread=True, stop=stop)) as ahead:
        for update in range(start, stop):
            yield ahead.get(update)


def _name(cache: Cache) -> str:
    return f"cache {cache.manifest.label}"


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)

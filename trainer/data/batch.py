"""One batch: what a method is given at an update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema.loading.pool import PooledTensors
from cache_schema.reading.batch import EncodedBatch
from trainer.data.features import not_finite

IMAGES = "images"  # their name in pooled memory


@dataclass
class Batch:
    """B labelled rows, then U unlabelled ones. Features wait as encoded until `to` decodes them."""

    images: Tensor  # (B+U, 3, S, S) uint8
    labels: Tensor  # (B+U,) int64, -1 = unlabelled
    encoded: Mapping[str, EncodedBatch] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)  # (B+U, P, L, C_t) float32, by the method's names
    unlabelled: int = 0  # U
    # (B+U, 4) float32: what an image shows of the picture that the teacher saw, as (left, top, right, bottom) in
    # fractions of its sides, below 0 or above 1 where it shows more; None where no method asks.
    boxes: Tensor | None = None
    # (B+U, P) int64: which of the run's timesteps, counted from 0, an image's features are of; None: all, in order.
    timesteps: Tensor | None = None
    held: PooledTensors | None = None  # what `images` lie in, where their memory is used again

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """Move to `device` and decode the features there: encoded bytes are the cheaper ones to move."""
        return self.moved(device).decoded(dtype)

    def broken_features(self) -> tuple[str, np.ndarray] | None:
        """The first name whose decoded features are not finite, and which rows' (B+U,) bool; None: all are finite."""
        for name, values in self.features.items():
            broken = not_finite(values).numpy()
            if broken.any():
                return name, broken
        return None

    def moved(self, device: torch.device) -> Batch:
        """Still encoded, on `device`. To a GPU copies are queued on its current stream; nothing waits for them."""
        queued = device.type == "cuda"
        encoded = {name: part.to(device, non_blocking=queued) for name, part in self.encoded.items()}
        images = self.images.to(device, non_blocking=queued)
        if self.held is not None:
            self.held.copied(device)
        small = [None if part is None else _moved(part, device) for part in (self.labels, self.boxes, self.timesteps)]
        labels, boxes, timesteps = small
        assert labels is not None
        return Batch(images, labels, encoded, unlabelled=self.unlabelled, boxes=boxes, timesteps=timesteps)

    def decoded(self, dtype: torch.dtype = torch.float32, *, fused: bool = False) -> Batch:
        """With features as `dtype`, where the batch is; float32 where the cache keeps more than `dtype` could.

        `fused`: on a GPU by a kernel that is compiled first, as is worth it for many batches.
        """
        features = {}
        for name, part in self.encoded.items():
            wanted = dtype if part.coarse else torch.float32
            features[name] = part.decode(part.payload.device, wanted, fused=fused)
        return Batch(self.images, self.labels, {}, features, self.unlabelled, self.boxes, self.timesteps)

    @property
    def tensors(self) -> list[Tensor]:
        """All that the batch consists of, with what of its features is shared by other batches."""
        parts = [tensor for part in self.encoded.values() for tensor in (part.payload, part.scale, part.channel)]
        whole = [self.images, self.labels, self.boxes, self.timesteps, *parts, *self.features.values()]
        return [tensor for tensor in whole if tensor is not None]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self.held is not None:
            del state["images"]  # they lie in what is held, and that knows how to cross to another process
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.held is not None:
            self.images = self.held.tensors[IMAGES]

    def split(self, parts: int) -> Iterator[Batch]:
        """Cut into equal parts of decoded rows, each with its share of the labelled and of the unlabelled ones."""
        labelled = len(self.labels) - self.unlabelled
        for part in range(parts):
            rows = torch.cat(
                [
                    torch.arange(labelled * part // parts, labelled * (part + 1) // parts),
                    labelled + torch.arange(self.unlabelled * part // parts, self.unlabelled * (part + 1) // parts),
                ]
            ).to(self.labels.device)
            features = {name: value[rows] for name, value in self.features.items()}
            boxes, timesteps = (None if part is None else part[rows] for part in (self.boxes, self.timesteps))
            images, labels = self.images[rows], self.labels[rows]
            yield Batch(images, labels, {}, features, self.unlabelled // parts, boxes, timesteps)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor on `device`; from page-locked memory, or its copy would wait for all that is queued before it."""
    if device.type != "cuda":
        return tensor.to(device)
    if torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

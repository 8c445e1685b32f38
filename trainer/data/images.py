"""Student images: encoded bytes of the cache to uint8 tensors, decoded once and kept if they fit."""

from __future__ import annotations

import io
import math
import mmap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.errors import TrainError

if TYPE_CHECKING:
    from cache_schema import Cache


class ImageStore:
    """Images of a cache at the student's size, as (B, 3, S, S) uint8.

    Up to `memory_gb` of decoded images are kept, in memory that forked worker processes share.
    """

    def __init__(self, cache: Cache, size: int, rows: Sequence[int] | np.ndarray, memory_gb: float = 1.0):
        if cache.manifest.images is None:
            raise TrainError(f"cache {cache.manifest.label} holds no student images; rebuild it with images")
        self.cache, self.size = cache, size
        self.decoded: np.ndarray | None = None
        if len(rows) * 3 * size * size <= memory_gb * 1e9:
            self.rows = np.asarray(rows)
            self.place = {int(row): place for place, row in enumerate(rows)}
            self.decoded = _shared(len(rows), 3, size, size)
            self.known = _shared(len(rows)).view(bool)

    def load(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """Return the images of `rows` (any order, repeats allowed): (B, 3, S, S) uint8."""
        # Copied by NumPy, not torch: this runs in the prefetch thread, whose torch operations would bring a
        # second team of OpenMP threads to the cores that train.
        if self.decoded is None:
            return torch.from_numpy(self._decode(rows))
        places = np.array([self.place[int(row)] for row in rows])
        unknown = np.unique(places[~self.known[places]])
        if len(unknown):
            self.decoded[unknown] = self._decode(self.rows[unknown])
            # Marked after they are written: another process must never read an image that is half there.
            self.known[unknown] = True
        return torch.from_numpy(self.decoded[places])

    def _decode(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        images = self.cache.images([int(row) for row in rows])
        return np.stack([decode_image(data, self.size) for data in images])


def _shared(*shape: int) -> np.ndarray:
    """Zeroed uint8 memory shared with forked processes; anonymous, for containers often lack /dev/shm."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=np.uint8).reshape(shape)


def decode_image(data: bytes, size: int) -> np.ndarray:
    """Decode encoded image bytes to (3, size, size) uint8 RGB, resized (bicubic) only if it has another size."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)

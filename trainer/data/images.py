"""Student images: encoded bytes of the cache to uint8 pixels, decoded once where they fit into memory."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data.memory import SharedBytes, spare_memory
from trainer.device import usable_cores
from trainer.errors import TrainError

if TYPE_CHECKING:
    from cache_schema import Cache

# squash: the whole image, whatever its aspect. crop: the central square, without the usual margin (224 of 256).
Fit = Literal["squash", "crop"]
CENTRE = 224 / 256
_THREADS = 8  # that decode, at most


def choose_fit(wanted: Literal["auto", Fit], cache: Cache) -> Fit:
    """How images are made square: auto crops those that the cache stores with their aspect and a margin."""
    if wanted != "auto":
        return wanted
    images = cache.manifest.images
    return "crop" if images is not None and images.shape == "aspect" else "squash"


class ImageStore:
    """The images of some rows of a cache, at the student's size or as they are stored.

    Decoded images are kept, as many as fit, in memory that forked worker processes share; the others are decoded
    every time, by several threads where this is not a worker process.
    """

    def __init__(
        self,
        cache: Cache,
        size: int,
        rows: Sequence[int] | np.ndarray,
        memory_gb: float | None = None,
        fit: Fit = "squash",
        *,
        as_stored: bool = False,
    ):
        """`memory_gb` None: a share of what is free. `as_stored`: for `pictures` rather than for `load`."""
        if cache.manifest.images is None:
            raise TrainError(f"cache {cache.manifest.label} holds no student images; rebuild it with images")
        self.cache, self.size, self.fit, self.as_stored = cache, size, fit, as_stored
        distinct = np.unique(np.asarray(rows, dtype=np.int64))
        shapes = _stored_shapes(cache, distinct) if as_stored else np.full((len(distinct), 2), size)
        ends = np.cumsum(3 * shapes[:, 0] * shapes[:, 1])
        limit = spare_memory() if memory_gb is None else int(memory_gb * 1e9)
        kept = int(np.searchsorted(ends, limit, side="right"))
        self._place = {int(row): place for place, row in enumerate(distinct[:kept])}
        self._shapes, self._ends = shapes[:kept], ends[:kept]
        self._pixels = SharedBytes(int(ends[kept - 1]) if kept else 0)
        self._known = SharedBytes(kept)  # 1 for each picture that is there
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    @property
    def kept(self) -> int:
        """How many images stay in memory."""
        return len(self._place)

    @property
    def kept_bytes(self) -> int:
        """How much memory they take, or will when each was decoded."""
        return int(self._ends[-1]) if self.kept else 0

    def load(self, rows: Sequence[int] | np.ndarray, out: Tensor | None = None) -> Tensor:
        """The images of `rows` (any order, repeats allowed) at the student's size: (B, 3, S, S) uint8, in `out`."""
        # Copied by NumPy, not torch: this runs in the prefetch thread, whose torch operations would bring a
        # second team of OpenMP threads to the cores that train.
        pictures = self.pictures(rows)
        if self.as_stored:
            pictures = [fit_picture(Image.fromarray(picture), self.size, self.fit) for picture in pictures]
        if out is None:
            out = torch.empty((len(pictures), 3, self.size, self.size), dtype=torch.uint8)
        for image, picture in zip(out.numpy(), pictures, strict=True):
            image[:] = picture.transpose(2, 0, 1)
        return out

    def boxes(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What `load` shows of each picture: (B, 4) as (left, top, right, bottom) in fractions of its sides."""
        samples, numbers = self.cache.samples, np.asarray(rows, dtype=np.int64)
        shown = np.ones((len(numbers), 2))
        if self.fit == "crop":
            sides = np.ones_like(shown)  # of the stored pictures: those of a cache of squares are squashed
            assert self.cache.manifest.images is not None
            if self.cache.manifest.images.shape == "aspect":
                sides = np.stack([samples[name].take(numbers).to_numpy() for name in ("width", "height")], axis=1)
            shown = CENTRE * sides.min(1, keepdims=True) / sides
        return np.concatenate([(1 - shown) / 2, (1 + shown) / 2], axis=1)

    def pictures(self, rows: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The images of `rows`, (H, W, 3) uint8 each, not to be written to; of one size unless `as_stored`."""
        numbers = [int(row) for row in rows]
        wanted = [row for row in dict.fromkeys(numbers) if not self._is_known(row)]
        fresh = dict(zip(wanted, self._decode(wanted), strict=True))
        for row, picture in fresh.items():
            self._keep(row, picture)
        return [fresh[row] if row in fresh else self._kept(self._place[row]) for row in numbers]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}  # threads stay where they are

    def _is_known(self, row: int) -> bool:
        place = self._place.get(row)
        return place is not None and bool(self._known.array[place])

    def _kept(self, place: int) -> np.ndarray:
        height, width = self._shapes[place]
        end = int(self._ends[place])
        return self._pixels.array[end - 3 * height * width : end].reshape(height, width, 3)

    def _keep(self, row: int, picture: np.ndarray) -> None:
        place = self._place.get(row)
        if place is not None and tuple(self._shapes[place]) == picture.shape[:2]:
            self._kept(place)[:] = picture
            # Marked after it is written: another process must never read an image that is half there.
            self._known.array[place] = 1

    def _decode(self, rows: Sequence[int]) -> list[np.ndarray]:
        encoded = self.cache.images(rows) if len(rows) else []
        if len(encoded) < 2 or multiprocessing.parent_process() is not None:
            return [self._picture(data) for data in encoded]
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not outlive a fork
            self._pool = os.getpid(), ThreadPoolExecutor(min(_THREADS, usable_cores()), "decode")
        return list(self._pool[1].map(self._picture, encoded))

    def _picture(self, data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return np.asarray(image) if self.as_stored else fit_picture(image, self.size, self.fit)


def fit_picture(image: Image.Image, size: int, fit: Fit) -> np.ndarray:
    """An RGB image as a student sees it at test time: (size, size, 3) uint8, resized (bicubic) only if need be."""
    box = None
    if fit == "crop":
        side = max(1, round(min(image.size) * CENTRE))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        if side == size:
            return np.asarray(image.crop(box))
    elif image.size == (size, size):
        return np.asarray(image)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _stored_shapes(cache: Cache, rows: np.ndarray) -> np.ndarray:
    """(n, 2) int64: height and width of the stored images."""
    assert cache.manifest.images is not None
    sides = [cache.samples[name].to_numpy()[rows].tolist() for name in ("width", "height")]
    stored = [cache.manifest.images.stored_size(width, height) for width, height in zip(*sides, strict=True)]
    return np.array(stored, dtype=np.int64).reshape(-1, 2)[:, ::-1]

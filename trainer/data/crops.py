"""Student images of the views `crop.k`: the part of the stored picture whose features a cache holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from cache_schema.format.vocabulary import CROP_VIEW
from trainer.data.augmentation import random_crop
from trainer.data.images import ImageStore, fit_picture

if TYPE_CHECKING:
    from cache_schema import Cache

Box = tuple[float, float, float, float]


class CropViews:
    """The random crops among a run's views; false where there are none."""

    def __init__(self, cache: Cache, views: tuple[str, ...]):
        numbers = {n: int(view.removeprefix(CROP_VIEW)) for n, view in enumerate(views) if view.startswith(CROP_VIEW)}
        self._boxes = {view: cache.crops[:, number] for view, number in numbers.items()}

    def __bool__(self) -> bool:
        return bool(self._boxes)

    def part(self, picture: np.ndarray, row: int, view: int) -> tuple[np.ndarray, Box | None]:
        """What a view (its number) shows of the picture (H, W, 3) of a row, and the box of that in fractions of it.

        Whole pixels, no fewer than the crop has; without a box the whole picture, where the view is no crop.
        """
        boxes = self._boxes.get(int(view))
        if boxes is None:
            return picture, None
        height, width = picture.shape[:2]
        # Stored in single precision: an edge between two pixels must not take in the one beyond.
        left, top = (math.floor(edge + _ROUNDING) for edge in boxes[row, :2] * (width, height))
        right, bottom = (math.ceil(edge - _ROUNDING) for edge in boxes[row, 2:] * (width, height))
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        return picture[top:bottom, left:right], (left / width, top / height, right / width, bottom / height)

    def show(
        self,
        images: Tensor,
        store: ImageStore,
        rows: np.ndarray,
        views: np.ndarray,
        scale: tuple[float, float] | None,
        numbers: np.ndarray,
    ) -> np.ndarray:
        """Fill (n, 3, S, S) uint8 with what is shown of each picture; returns its boxes (n, 4), in fractions of it.

        scale: of a random crop inside that, drawn by numbers (n, DRAWS); None: all of it.
        """
        if scale is None and not self:
            store.load(rows, out=images)
            return store.boxes(rows)
        boxes = store.boxes(rows)
        for place, picture in enumerate(store.pictures(rows)):
            part, part_box = self.part(picture, rows[place], views[place])
            if scale is not None:
                image, box = random_crop(part, store.size, scale, numbers[place])
                images[place] = image
            else:
                # A crop is shown whole; of a whole picture, what the student sees at test time.
                box = (0.0, 0.0, 1.0, 1.0)
                fit = store.fit if part_box is None else "squash"
                images.numpy()[place] = fit_picture(Image.fromarray(part), store.size, fit).transpose(2, 0, 1)
            if part_box is not None or scale is not None:
                boxes[place] = inner_box(part_box, box)
        return boxes


_ROUNDING = 1e-3  # pixels


def inner_box(outer: Box | None, inner: Box) -> Box:
    """A box in fractions of another, in fractions of what the other is in; None is all of that."""
    if outer is None:
        return inner
    left, top, right, bottom = outer
    width, height = right - left, bottom - top
    return left + inner[0] * width, top + inner[1] * height, left + inner[2] * width, top + inner[3] * height

"""Which rows of a batch have no label, and in which view: of another split, or training images once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trainer.data.features import Needs
from trainer.data.splits import select_split
from trainer.errors import TrainError

if TYPE_CHECKING:
    from cache_schema import Cache


def unlabelled_rows(cache: Cache, needs: Needs, labelled: np.ndarray, views: tuple[str, ...]) -> np.ndarray:
    """(n,) rows with features to draw from; `labelled`: those of the training images, without validation classes.

    Raises TrainError where there are none, or where training images have no other view to be shown in.
    """
    wanted, (per_batch, taken_from) = needs.unlabelled_from, needs.unlabelled_settings
    if wanted != "unlabeled" and len(views) < 2:
        raise TrainError(
            f"training images are shown in {views[0]} alone, and without a label they need another view: build the "
            f"cache with --views canonical,hflip, set augment.flip=true, or set {taken_from}=unlabeled"
        )
    if wanted == "train":
        return labelled
    rows = select_split(cache, "unlabeled", need_features=True).rows
    if not len(rows):
        raise TrainError(
            f"cache {cache.manifest.label} has no unlabeled rows with features; set {per_batch}=0, or "
            f"{taken_from}=train"
        )
    return rows if wanted == "unlabeled" else np.concatenate([labelled, rows])


def other_views(
    rows: np.ndarray, views: np.ndarray, labelled: int, count: int, random: np.random.Generator
) -> np.ndarray:
    """The views (n,) of a batch, of `count`, in which no unlabelled row repeats a labelled one's image and view.

    The first `labelled` rows are the labelled ones. An image whose views all have labels keeps the one drawn for it.
    """
    numbers = random.random(len(rows))
    used: dict[int, set[int]] = {}
    for row, view in zip(rows[:labelled].tolist(), views[:labelled].tolist(), strict=True):
        used.setdefault(row, set()).add(view)
    changed = views.copy()
    for place in range(labelled, len(rows)):
        free = [view for view in range(count) if view not in used.get(int(rows[place]), ())]
        if 0 < len(free) < count:
            changed[place] = free[int(numbers[place] * len(free))]
    return changed

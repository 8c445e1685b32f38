"""Which rows of a cache are trained on or evaluated on, and their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.errors import TrainError

if TYPE_CHECKING:
    from cache_schema import Cache

_HELD_OUT = 14  # the stream that says which classes are held out


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
    return _split(rows, labels)


def hold_out_classes(split: Split, share: float) -> tuple[Split, Split]:
    """Take a share of the classes out of a split, with all their images: what is left, and what was taken.

    Which classes does not depend on the seed of a run: runs of several seeds are compared on the same ones. At least
    two are taken and two are left; raises TrainError where there are too few. A share of 0 takes nothing.
    """
    if not share:
        return split, Split(split.rows[:0], split.labels[:0], 0)
    count = max(2, round(share * split.classes))
    if split.classes - count < 2:
        raise TrainError(
            f"{count} of {split.classes} training classes cannot be held out: at least two are needed to train on; "
            "lower --validation-classes"
        )
    order = np.random.Generator(np.random.Philox(key=_HELD_OUT)).permutation(split.classes)
    held = np.isin(split.labels, order[:count])
    return _split(split.rows[~held], split.labels[~held]), _split(split.rows[held], split.labels[held])


def _split(rows: np.ndarray, labels: np.ndarray) -> Split:
    names, dense = np.unique(labels, return_inverse=True)
    return Split(rows, dense.astype(np.int64), len(names))

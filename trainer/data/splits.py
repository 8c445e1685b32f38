"""Which rows of a cache are trained on or evaluated on, and their labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cache_schema import Cache


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

"""How sure a score is: bootstrap over classes and over queries, and the paired test of two students.

Images of a class are alike, and which classes were left for the test is the larger chance: resampling classes with all
their queries (a cluster bootstrap; Davison & Hinkley, "Bootstrap Methods and their Application", 1997, §3.8) gives the
interval for *other classes*, resampling queries the one for other images of the same classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.errors import TrainError

RESAMPLES, LEVEL = 2000, 0.95
_BLOCK = 1 << 22  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that percentiles of its bootstrap give."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The mean of a − b on the same queries with its interval, and the two-sided p of no difference."""

    value: float
    low: float
    high: float
    p: float


def class_bootstrap(
    values: np.ndarray, classes: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Mean of `values` (N,) over queries of classes (N,), with whole classes resampled.

    NaN is a query for which the score is undefined, and counts for nothing. The same seed gives the same interval.
    """
    sums, counts = _by_class(values, classes)
    low, high = _percentiles(_resampled(sums, counts, resamples, seed), level)
    return Interval(_mean(values), low, high)


def query_bootstrap(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
    """The same with single queries resampled."""
    return class_bootstrap(values, np.arange(len(values)), resamples, seed, level)


def paired_class_bootstrap(
    a: np.ndarray, b: np.ndarray, classes: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Difference:
    """The difference of two scores (N,) of the same queries, with the same classes resampled for both.

    p = 2 · min(P(a − b ≤ 0), P(a − b ≥ 0)) among the resamples, one added to each count, so that it is never 0.
    Raises TrainError where the queries are not the same.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
        raise TrainError("a paired test compares scores of the same queries; these are of different ones")
    difference = a - b
    drawn = _resampled(*_by_class(difference, classes), resamples, seed)
    low, high = _percentiles(drawn, level)
    fewer = 1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Difference(_mean(difference), low, high, min(1.0, 2 * fewer / (len(drawn) + 1)))


def _by_class(values: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the defined values of each class that has any, (M,) each."""
    values, classes = np.asarray(values, dtype=np.float64), np.asarray(classes)
    defined = ~np.isnan(values)
    if not defined.any():
        return np.zeros(1), np.ones(1)
    _, dense = np.unique(classes[defined], return_inverse=True)
    return np.bincount(dense, weights=values[defined]), np.bincount(dense).astype(np.float64)


def _resampled(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The mean in each of the resamples, (resamples,); memory is bounded whatever the number of classes."""
    classes = len(sums)
    random = np.random.Generator(np.random.Philox(key=seed))
    means, at_once = [], max(1, _BLOCK // classes)
    for start in range(0, resamples, at_once):
        drawn = random.integers(classes, size=(min(at_once, resamples - start), classes))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    return np.concatenate(means)


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean(values: np.ndarray) -> float:
    values = np.asarray(values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else 0.0

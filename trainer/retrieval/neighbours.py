"""The nearest of many vectors by cosine, exactly: candidates in float32, ranked as the evaluation ranks them."""

from __future__ import annotations

import numpy as np

_BLOCK = 1 << 24  # numbers multiplied at once
_STEP = 2.0**30  # similarities are rounded to steps of 2⁻³⁰, as in `evaluation.metrics`


def norms_of(vectors: np.ndarray) -> np.ndarray:
    """Lengths of vectors (N, C): (N,) float64, never 0."""
    found = np.empty(len(vectors), dtype=np.float64)
    for start, stop in _blocks(vectors):
        found[start:stop] = np.linalg.norm(vectors[start:stop].astype(np.float64), axis=1)
    return np.maximum(found, 1e-12)


def nearest(
    vectors: np.ndarray, norms: np.ndarray, query: np.ndarray, top: int, skip: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` rows of vectors (N, C) float32 nearest to a query (C,), best first, and their cosines.

    The same order as an exact ranking in float64, ties to the lower row; `skip` is a row to leave out.
    """
    unit = (query / max(float(np.linalg.norm(query.astype(np.float64))), 1e-12)).astype(np.float32)
    rough = np.empty(len(vectors), dtype=np.float32)
    for start, stop in _blocks(vectors):
        rough[start:stop] = (vectors[start:stop] @ unit) / norms[start:stop]
    if skip is not None:
        rough[skip] = -np.inf
    count = min(top, len(vectors) - (skip is not None))
    if count < 1:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    # No sum of C products in float32 is further off than this (Higham, "Accuracy and Stability", 2002, §3.1).
    slack = 2 * (vectors.shape[1] + 4) * float(np.finfo(np.float32).eps)
    worst = np.partition(rough, len(rough) - count)[len(rough) - count]
    return rank(vectors, norms, query, np.flatnonzero(rough >= worst - slack), count)


def rank(
    vectors: np.ndarray, norms: np.ndarray, query: np.ndarray, rows: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The `top` of some rows by their cosine with a query, computed in float64; ties to the lower row."""
    rows = np.sort(np.asarray(rows, dtype=np.int64))
    exact = query.astype(np.float64)
    exact /= max(float(np.linalg.norm(exact)), 1e-12)
    found = np.concatenate([vectors[part].astype(np.float64) @ exact for part in _parts(rows, vectors.shape[1])])
    similarity = np.rint(found / norms[rows] * _STEP)
    order = np.argsort(-similarity, kind="stable")[:top]
    return rows[order], similarity[order] / _STEP


def _blocks(vectors: np.ndarray) -> list[tuple[int, int]]:
    size = max(1, _BLOCK // max(1, vectors.shape[1]))
    return [(start, min(start + size, len(vectors))) for start in range(0, len(vectors), size)]


def _parts(rows: np.ndarray, channels: int) -> list[np.ndarray]:
    size = max(1, _BLOCK // max(1, channels))
    return [rows[start : start + size] for start in range(0, max(1, len(rows)), size)]

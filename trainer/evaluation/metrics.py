"""Retrieval metrics as pure functions: every image queries all the others, by cosine similarity.

Ties are broken by the lower index, so a table does not depend on chunking, threads or the sort that was used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import TrainError

KS = (1, 2, 4, 8)
# The columns of every table: keys of the result files, and what people call them.
COLUMNS = {**{f"recall_at_{k}": f"R@{k}" for k in KS}, "map_at_r": "mAP@R"}


def ranked_neighbours(embeddings: Tensor, depth: int, chunk: int = 1024) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, indices (chunk, depth)): the `depth` nearest others of each of a chunk of queries, best first.

    embeddings (N, C), any scale. Memory is O(chunk · N), whatever N. Raises TrainError where an embedding is not
    finite: it has no neighbours, and any score of it would be an accident.
    """
    broken = int((~embeddings.isfinite().all(1)).sum())
    if broken:
        raise TrainError(
            f"{broken} of {len(embeddings)} embeddings are not finite, so they cannot be scored; the network that made "
            "them is broken: train it again with a lower --lr"
        )
    unit = F.normalize(embeddings.double(), dim=-1)  # (N, C)
    N = len(unit)
    depth = min(depth, N - 1)
    tie_break = torch.arange(N - 1, -1, -1, device=unit.device)  # (N,) larger is earlier
    for start in range(0, N, chunk):
        # In float64, then rounded to steps of 2⁻³⁰: equal pairs come out equal whatever the blocking of the
        # matrix product, and embeddings are float32 at best.
        similarity = ((unit[start : start + chunk] @ unit.T) * 2**30).round().long()  # (chunk, N)
        keys = (similarity << 32) | tie_break  # unique, so that top-k has one answer
        rows = torch.arange(len(keys), device=keys.device)
        keys[rows, rows + start] = torch.iinfo(torch.int64).min  # a query does not find itself
        yield start, keys.topk(depth, dim=1).indices


def recall_at_k(embeddings: Tensor, labels: Tensor, ks: Sequence[int] = KS, chunk: int = 1024) -> dict[int, float]:
    """Recall@K: the share of queries with an image of their class among the K nearest others, in 0..1.

    embeddings (N, C), labels (N,). A query whose class has no other image counts as a miss.
    """
    hits = dict.fromkeys(ks, 0)
    for start, neighbours in ranked_neighbours(embeddings, max(ks), chunk):
        relevant = labels[neighbours] == labels[start : start + len(neighbours), None]  # (chunk, K)
        for k in ks:
            hits[k] += int(relevant[:, :k].any(1).sum())
    return {k: count / max(1, len(labels)) for k, count in hits.items()}


def map_at_r(embeddings: Tensor, labels: Tensor, chunk: int = 1024) -> float:
    """MAP@R, in 0..1: the mean over queries of (1/R) · Σ_{i ≤ R} precision@i · [i-th neighbour is relevant].

    R is the number of other images of the query's class (Musgrave et al., "A Metric Learning Reality Check",
    2020, §3.2). Queries with R = 0, for which it is undefined, are left out of the mean; 0 if none is left.
    """
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    R = counts[inverse] - 1  # (N,)
    if not bool((R > 0).any()):
        return 0.0
    depth = int(R.max())
    ranks = torch.arange(1, depth + 1, device=labels.device)  # (depth,)
    total = 0.0
    for start, neighbours in ranked_neighbours(embeddings, depth, chunk):
        own, r = labels[start : start + len(neighbours), None], R[start : start + len(neighbours), None]
        relevant = ((labels[neighbours] == own) & (ranks <= r)).double()  # (chunk, depth)
        precision = relevant.cumsum(1) / ranks
        total += float(((precision * relevant).sum(1, keepdim=True) / r.clamp_min(1)).sum())
    return total / int((R > 0).sum())


def retrieval_scores(embeddings: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recall at each K and MAP@R under the names used in all result files (`recall_at_1`, …, `map_at_r`)."""
    recalls = recall_at_k(embeddings, labels, ks)
    return {**{f"recall_at_{k}": recalls[k] for k in ks}, "map_at_r": map_at_r(embeddings, labels)}

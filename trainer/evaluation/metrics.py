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
PAIRS = 1 << 24  # similarities at once, of which some copies of 8 bytes exist
# The columns of every table: keys of the result files, and what people call them.
COLUMNS = {**{f"recall_at_{k}": f"R@{k}" for k in KS}, "map_at_r": "mAP@R"}
DETAILED = {**COLUMNS, "r_precision": "R-Precision"}  # of `dit-train eval`


def ranked_neighbours(embeddings: Tensor, depth: int, chunk: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, indices (chunk, depth)): the `depth` nearest others of each of a chunk of queries, best first.

    embeddings (N, C), any scale. By default a chunk is as large as keeps chunk · N below 2²⁴. Raises TrainError where
    an embedding is not finite: it has no neighbours, and any score of it would be an accident.
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
    chunk = chunk or max(1, min(1024, PAIRS // max(1, N)))
    tie_break = torch.arange(N - 1, -1, -1, device=unit.device)  # (N,) larger is earlier
    for start in range(0, N, chunk):
        # In float64, then rounded to steps of 2⁻³⁰: equal pairs come out equal whatever the blocking of the
        # matrix product, and embeddings are float32 at best.
        similarity = ((unit[start : start + chunk] @ unit.T) * 2**30).round().long()  # (chunk, N)
        keys = (similarity << 32) | tie_break  # unique, so that top-k has one answer
        rows = torch.arange(len(keys), device=keys.device)
        keys[rows, rows + start] = torch.iinfo(torch.int64).min  # a query does not find itself
        yield start, keys.topk(depth, dim=1).indices


def score_queries(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = KS, chunk: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Every query's scores by name, (N,) float64 each, NaN where undefined, and its nearest other image, (N,) int64.

    embeddings (N, C), labels (N,), both on the device to compute on. With R the number of other images of the query's
    class: `recall_at_K`, whether one is among the K nearest (without any it is a miss); `r_precision`, their share of
    the R nearest, and `map_at_r`, (1/R) · Σ_{i ≤ R} precision@i · [i-th neighbour is relevant], both undefined for
    R = 0 (Musgrave et al., "A Metric Learning Reality Check", 2020, §3.2). Raises TrainError as `ranked_neighbours`.
    """
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    R = counts[inverse] - 1  # (N,)
    depth = max(*ks, int(R.max()) if len(R) else 0)
    ranks = torch.arange(1, depth + 1, device=labels.device)  # (depth,)
    names = [*(f"recall_at_{k}" for k in ks), "map_at_r", "r_precision"]
    scores = {name: torch.full((len(labels),), torch.nan, dtype=torch.float64, device=labels.device) for name in names}
    nearest = torch.zeros(len(labels), dtype=torch.int64, device=labels.device)
    for start, neighbours in ranked_neighbours(embeddings, depth, chunk):
        at = slice(start, start + len(neighbours))
        found = labels[neighbours] == labels[at, None]  # (chunk, depth)
        for k in ks:
            scores[f"recall_at_{k}"][at] = found[:, :k].any(1).double()
        r, rank = R[at, None], ranks[: found.shape[1]]
        relevant = (found & (rank <= r)).double()
        precision = relevant.cumsum(1) / rank
        scores["map_at_r"][at] = (precision * relevant).sum(1) / r[:, 0]  # 0 / 0 is undefined
        scores["r_precision"][at] = relevant.sum(1) / r[:, 0]
        if found.shape[1]:
            nearest[at] = neighbours[:, 0]
    return scores, nearest


def mean_score(values: Tensor) -> float:
    """The mean over the queries for which a score is defined; 0 if there are none."""
    defined = values[~values.isnan()]
    return float(defined.mean()) if len(defined) else 0.0


def recall_at_k(
    embeddings: Tensor, labels: Tensor, ks: Sequence[int] = KS, chunk: int | None = None
) -> dict[int, float]:
    """Recall@K: the share of queries with an image of their class among the K nearest others, in 0..1."""
    scores, _ = score_queries(embeddings, labels, ks, chunk)
    return {k: mean_score(scores[f"recall_at_{k}"]) for k in ks}


def map_at_r(embeddings: Tensor, labels: Tensor, chunk: int | None = None) -> float:
    """MAP@R, in 0..1, over the queries whose class has another image."""
    return mean_score(score_queries(embeddings, labels, chunk=chunk)[0]["map_at_r"])


def retrieval_scores(embeddings: Tensor, labels: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Recall at each K and MAP@R under the names used in all result files (`recall_at_1`, …, `map_at_r`)."""
    scores, _ = score_queries(embeddings, labels, ks)
    return {name: mean_score(scores[name]) for name in (*(f"recall_at_{k}" for k in ks), "map_at_r")}

"""Retrieval metrics as pure functions: every image queries all the others, by cosine similarity.

Ties are broken by the lower index, so a table does not depend on chunking, threads or the sort that was used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.device import full_precision
from trainer.errors import TrainError

KS = (1, 2, 4, 8)
PAIRS = 1 << 24  # similarities at once, of which some copies exist
SPARE = 64  # neighbours beside the wanted ones that float32 proposes and float64 puts in order
WORTH = 128  # times fewer candidates than images: else, computing all similarities in float64 is as fast
# The columns of every table: keys of the result files, and what people call them.
COLUMNS = {**{f"recall_at_{k}": f"R@{k}" for k in KS}, "map_at_r": "mAP@R"}
DETAILED = {**COLUMNS, "r_precision": "R-Precision"}  # of `dit-train eval`


def ranked_neighbours(embeddings: Tensor, depth: int, chunk: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, indices (chunk, depth)): the `depth` nearest others of each of a chunk of queries, best first.

    embeddings (N, C), any scale, on the device to compute on. By default a chunk is as large as keeps chunk · N below
    2²⁴: beside the embeddings and a copy of them, this takes a few hundred MB whatever N is. Where a few of many are
    wanted, float32 finds candidates, the more the nearer they lie together, and float64 puts them in order: the
    ranking is that of float64 to the last place, ties included. Raises TrainError where an embedding is not finite: it
    has no neighbours, and any score of it would be an accident.
    """
    broken = int((~embeddings.isfinite().all(1)).sum())
    if broken:
        raise TrainError(
            f"{broken} of {len(embeddings)} embeddings are not finite, so they cannot be scored; the network that made "
            "them is broken: train it again with a lower --lr"
        )
    N = len(embeddings)
    depth = min(depth, N - 1)
    chunk = chunk or max(1, min(1024, PAIRS // max(1, N)))
    few = (depth + SPARE) * WORTH <= N
    ranking = _Candidates(embeddings) if few else _Exact(embeddings)
    for start in range(0, N, chunk):
        queries = torch.arange(start, min(start + chunk, N), device=embeddings.device)
        yield start, ranking.nearest(queries, depth)


class _Exact:
    """Neighbours by all similarities in float64, rounded to steps of 2⁻³⁰.

    Rounded, equal pairs come out equal whatever the blocking of the matrix product, and embeddings are float32 at best.
    """

    def __init__(self, embeddings: Tensor):
        self.unit = F.normalize(embeddings.double(), dim=-1)  # (N, C)
        self.others = torch.arange(len(embeddings), device=embeddings.device)

    def nearest(self, queries: Tensor, depth: int) -> Tensor:
        """Indices (B, depth) of the nearest others of `queries` (B,), best first."""
        keys = _keys(self.unit[queries] @ self.unit.T, self.others)  # (B, N)
        keys.scatter_(1, queries[:, None], torch.iinfo(torch.int64).min)  # a query does not find itself
        return keys.topk(depth, dim=1).indices


class _Candidates:
    """The same neighbours, found in float32: SPARE more than wanted, unless so many lie too near each other to tell."""

    def __init__(self, embeddings: Tensor):
        self.embeddings = embeddings
        self.norm = embeddings.double().norm(dim=1, keepdim=True).clamp_min(1e-12)  # (N, 1)
        self.unit = torch.cat([(part.double() / norm).float() for part, norm in self._parts()])
        # What a float32 product of unit vectors is wrong by at most, in whatever order it is summed: Higham, "Accuracy
        # and Stability of Numerical Algorithms", §3.1; and the steps that similarities are rounded to.
        self.error = (embeddings.shape[1] + 4) * 2.0**-24 + 2.0**-30

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = max(1, PAIRS // self.embeddings.shape[1])
        return zip(self.embeddings.split(rows), self.norm.split(rows), strict=True)

    def nearest(self, queries: Tensor, depth: int) -> Tensor:
        """Indices (B, depth) of the nearest others of `queries` (B,), best first."""
        with full_precision(queries.device), _without_tf32():
            similarity = self.unit[queries] @ self.unit.T  # (B, N)
        similarity.scatter_(1, queries[:, None], -torch.inf)  # a query does not find itself
        values, candidates = similarity.topk(depth + SPARE, dim=1)
        del similarity
        found = self._ordered(queries, candidates, depth)
        # Anything further from the last one wanted than both can be wrong by is behind it; the rest was proposed.
        unsure = values[:, -1] >= values[:, depth - 1] - 2 * self.error
        if unsure.any():
            found[unsure] = self.exact.nearest(queries[unsure], depth)
        return found

    @cached_property
    def exact(self) -> _Exact:
        return _Exact(self.embeddings)

    def _ordered(self, queries: Tensor, candidates: Tensor, depth: int) -> Tensor:
        """The best `depth` of candidates (B, K), by float64."""
        found = []
        rows = max(1, PAIRS // (candidates.shape[1] * self.embeddings.shape[1]))
        for query, near in zip(queries.split(rows), candidates.split(rows), strict=True):
            own, others = self.embeddings[query].double(), self.embeddings[near].double()  # (b, C), (b, K, C)
            product = (others @ own.unsqueeze(-1)).squeeze(-1)
            keys = _keys(product / (self.norm[near].squeeze(-1) * self.norm[query]), near)
            keys.masked_fill_(near == query[:, None], torch.iinfo(torch.int64).min)
            found.append(near.gather(1, keys.topk(depth, dim=1).indices))
        return torch.cat(found)


def _keys(similarity: Tensor, others: Tensor) -> Tensor:
    """Integers in the order of similarities to `others`, the lower index first of equals: no two are the same.

    The similarities are written over: with those of many images at once, each copy of them counts.
    """
    keys = similarity.mul_(2**30).round_().long()
    return keys.bitwise_left_shift_(32).bitwise_or_(torch.iinfo(torch.int32).max - others)


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    return mean_scores(score_queries(embeddings, labels, ks)[0], ks)


def mean_scores(scores: Mapping[str, Tensor], ks: Sequence[int] = KS) -> dict[str, float]:
    """The same, of scores that `score_queries` found."""
    return {name: mean_score(scores[name]) for name in (*(f"recall_at_{k}" for k in ks), "map_at_r")}

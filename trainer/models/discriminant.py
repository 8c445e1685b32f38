"""A linear head on frozen features in closed form: the directions in which classes differ more than their images do."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.models.components import Moments, by_kind, of_kinds

# Towards a multiple of the identity, for few images say little of many directions: see benchmarks/README.md.
SHRINKAGE = 0.3
RELATIVE_FLOOR = 1e-9  # of the largest variance: directions below it are rounding


class ClassMoments(Moments):
    """Moments of labelled samples, with the mean of each class beside those of all."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(0, dtype=torch.float64)  # (M,)
        self.sums: Tensor | None = None  # (M, P, C)

    def add_labelled(self, samples: Tensor, labels: Tensor) -> None:
        """Take in (B, P, C) with labels (B,); rows without one, -1, are left out."""
        known = labels >= 0
        samples, labels = samples[known], labels[known]
        if not len(labels):
            return
        self.add(samples.unsqueeze(2))
        values = samples.double()
        M = max(len(self.counts), int(labels.max()) + 1)
        if self.sums is None:
            self.sums = values.new_zeros(0, *values.shape[1:])
        more = M - len(self.counts)
        self.sums = torch.cat([self.sums, values.new_zeros(more, *values.shape[1:])]).index_add_(0, labels, values)
        counts = torch.cat([self.counts.to(labels.device), values.new_zeros(more)])
        self.counts = counts.index_add_(0, labels, values.new_ones(len(labels)))

    def within(self) -> Tensor:
        """Covariance of the deviations from class means: (P, C, C)."""
        assert self.mean is not None
        assert self.products is not None
        assert self.sums is not None
        seen = self.counts > 0
        means = self.sums[seen] / self.counts[seen, None, None]  # (M, P, C)
        apart = ((means - self.mean) * self.counts[seen].sqrt()[:, None, None]).transpose(0, 1)  # (P, M, C)
        freedom = max(1, self.count - int(seen.sum()))
        return (self.products - apart.transpose(1, 2) @ apart) / freedom


class Discriminant(nn.Module):
    """Features of P kinds, linearly, in the metric in which images of one class vary alike in all directions.

    Euclidean distance there is that of linear discriminant analysis, which nearest neighbours of classes that were
    not trained on profit from too. A component's mean square is 1; until `fit`, everything is mapped to 0.

    Source: Fisher, "The Use of Multiple Measurements in Taxonomic Problems", 1936; the covariance shrunk as in
    Friedman, "Regularized Discriminant Analysis", JASA 1989; as a metric for unseen classes: Hastie & Tibshirani,
    "Discriminant Adaptive Nearest Neighbor Classification", TPAMI 1996.
    """

    mean: Tensor
    weight: Tensor

    def __init__(self, kinds: int, channels: int, components: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(kinds, 1, channels))
        self.register_buffer("weight", torch.zeros(kinds, channels, components))

    def fit(self, samples: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure on batches of features (B, P, C) and labels (B,), of which -1 tells nothing."""
        moments = ClassMoments()
        for features, labels in samples:
            moments.add_labelled(features, labels)
        if moments.mean is None:
            return
        self.mean.copy_(moments.mean.unsqueeze(1))
        self.weight.copy_(discriminant_directions(moments, self.weight.shape[2]))

    def forward(self, features: Tensor, kinds: Tensor | None = None) -> Tensor:
        """(B, P, C) -> (B, P, K), float32; `kinds` (B, P): which kinds they are of; None: all, in order."""
        with torch.autocast(features.device.type, enabled=False):
            centred = features.float().unsqueeze(2) - of_kinds(self.mean, kinds)  # (B, P, 1, C)
            return by_kind(centred, self.weight, kinds).squeeze(2)


def discriminant_directions(moments: ClassMoments, components: int, shrinkage: float = SHRINKAGE) -> Tensor:
    """Of the leading principal components, whitened within classes: (P, C, K), with zeros where there are fewer."""
    found = [
        _whitened(covariance, within, components, shrinkage)
        for covariance, within in zip(moments.covariance(), moments.within(), strict=True)
    ]
    return torch.stack(found)


def _whitened(covariance: Tensor, within: Tensor, components: int, shrinkage: float) -> Tensor:
    """The same of one kind: (C, C) twice -> (C, K)."""
    variance, vectors = torch.linalg.eigh(covariance)  # ascending
    kept = min(components, int((variance > RELATIVE_FLOOR * variance[-1].clamp_min(1e-30)).sum()))
    if not kept:
        return covariance.new_zeros(len(covariance), components)
    leading = vectors[:, -kept:].flip(1)  # (C, kept)
    spread, turned = torch.linalg.eigh(leading.T @ within @ leading)
    # The median: a few massive channels have most of the variance, and the mean would be theirs.
    level = spread.median().clamp_min(RELATIVE_FLOOR * spread[-1].clamp_min(1e-30))
    shrunk = (1 - shrinkage) * spread.clamp_min(0) + shrinkage * level
    # Turned back, so that signs and order of eigenvectors cancel: machines agree on distances and on directions.
    found = leading @ (turned * shrunk.rsqrt()) @ turned.T  # (C, kept)
    square = (found.T @ covariance @ found).trace() / kept
    found = found * leading.gather(0, leading.abs().argmax(0, keepdim=True)).sign() / square.clamp_min(1e-30).sqrt()
    return nn.functional.pad(found, (0, components - kept))

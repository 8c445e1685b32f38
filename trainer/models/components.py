"""Principal components of the teacher's features, measured once, before the first update."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

RELATIVE_FLOOR = 1e-6  # of the largest variance: directions below it are rounding, and would be blown up


class Moments:
    """Mean and covariance of samples that come bit by bit: (…, P, N, C) -> (P, C) and (P, C, C), float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.products: Tensor | None = None  # summed outer products of deviations from the mean

    def add(self, samples: Tensor) -> None:
        """Take in (B, P, N, C): B · N vectors of C channels for each of P (Chan's update; nothing cancels)."""
        values = samples.double().transpose(0, 1).flatten(1, 2)  # (P, n, C)
        n = values.shape[1]
        own = values.mean(1)  # (P, C)
        deviations = values - own.unsqueeze(1)
        products = deviations.transpose(1, 2) @ deviations  # (P, C, C)
        if self.mean is None or self.products is None:
            self.count, self.mean, self.products = n, own, products
            return
        step, total = own - self.mean, self.count + n
        between = step.unsqueeze(2) * step.unsqueeze(1) * (self.count * n / total)
        self.products = self.products + products + between
        self.mean = self.mean + step * (n / total)
        self.count = total

    def covariance(self) -> Tensor:
        """(P, C, C)."""
        assert self.products is not None
        return self.products / max(1, self.count - 1)


class PrincipalComponents(nn.Module):
    """Vectors of P kinds in the K directions in which each kind varies most, divided by deviation^power.

    Channels are standardised first: in a large network a few of them are hundreds of times larger than the rest, and
    would decide every cosine. `power` 0.5 ("half-whitened") keeps some of the order of the directions, 1 none.
    All of it has one scale: a component's mean square is 1. Where there are fewer directions than K, zeros follow.
    Until `fit`, everything is mapped to 0.
    """

    mean: Tensor
    directions: Tensor

    def __init__(self, kinds: int, channels: int, components: int, power: float = 0.5):
        super().__init__()
        self.power = power
        self.register_buffer("mean", torch.zeros(kinds, 1, channels))
        self.register_buffer("directions", torch.zeros(kinds, channels, components))

    def fit(self, samples: Iterable[Tensor]) -> None:
        """Measure mean and directions on samples (B, P, N, C), one of them in memory at a time."""
        moments = Moments()
        for batch in samples:
            moments.add(batch)
        if moments.mean is None:
            return
        self.mean.copy_(moments.mean.unsqueeze(1))
        self.directions.copy_(directions(moments.covariance(), self.directions.shape[2], self.power))

    def forward(self, vectors: Tensor, kinds: Tensor | None = None) -> Tensor:
        """(B, P, N, C) -> (B, P, N, K), float32 whatever the autocast.

        kinds (B, P): which kinds the vectors are of; None: all, in order.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            return by_kind(vectors.float() - of_kinds(self.mean, kinds), self.directions, kinds)


def of_kinds(values: Tensor, kinds: Tensor | None) -> Tensor:
    """What there is of each kind, (P, …), for `kinds` (B, p) as (B, p, …); as it is for None, all of them in order."""
    return values if kinds is None else values[kinds]


def by_kind(vectors: Tensor, matrices: Tensor, kinds: Tensor | None) -> Tensor:
    """Each vector by the matrix of its kind: (B, p, N, C), (P, C, K), kinds (B, p) or None -> (B, p, N, K)."""
    if kinds is None:
        return vectors @ matrices
    P, C, K = matrices.shape
    if vectors.shape[2] * P > C:
        return vectors @ matrices[kinds]
    # Of few vectors the product with every kind's matrix is smaller than a matrix for each image would be.
    every = (vectors @ matrices.transpose(0, 1).flatten(1)).unflatten(-1, (P, K))  # (B, p, N, P, K)
    return every.take_along_dim(kinds[:, :, None, None, None], 3).squeeze(3)


def directions(covariance: Tensor, components: int, power: float) -> Tensor:
    """Leading directions of standardised channels, scaled as `PrincipalComponents` says: (P, C, C) -> (P, C, K)."""
    deviation = covariance.diagonal(dim1=1, dim2=2).sqrt()  # (P, C)
    inverse = torch.where(deviation > 0, 1 / deviation.clamp_min(1e-30), 0.0)  # a constant channel says nothing
    correlation = covariance * inverse.unsqueeze(1) * inverse.unsqueeze(2)
    variance, vectors = torch.linalg.eigh(correlation)  # ascending
    kept = min(components, variance.shape[1])
    variance, vectors = variance.flip(1)[:, :kept], vectors.flip(2)[:, :, :kept]
    told = variance > RELATIVE_FLOOR * variance[:, :1].clamp_min(1e-30)
    scale = torch.where(told, variance.clamp_min(1e-30).pow(-power / 2), 0.0)  # (P, kept)
    # Signs of eigenvectors are arbitrary: the largest entry is made positive, so that machines agree.
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    found = vectors * largest * scale.unsqueeze(1) * inverse.unsqueeze(2)  # (P, C, kept)
    square = (variance * scale.square()).sum(1) / told.sum(1).clamp_min(1)  # mean square of what is told
    found = found / square.clamp_min(1e-30).sqrt().view(-1, 1, 1)
    return nn.functional.pad(found, (0, components - kept))

"""The measures of a probe: pure functions of features and labels."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cache_schema.encoding.massive import ChannelTreatment
from cache_schema.format.vocabulary import MassiveChannels

Array = np.ndarray

# Frequencies beyond this share of the highest one along an axis count as high.
HIGH_FREQUENCY = 0.5
_RIDGE = 1.0


@dataclass(frozen=True)
class Score:
    """One tap at one timestep. recall_at_1, linear: shares of images; high_frequency: share of energy.

    massive: what was done to massive channels. plain_recall_at_1: of features that are not standardised, so that what
    massive channels drown shows.
    """

    tap: str
    timestep: int
    recall_at_1: float
    linear: float
    high_frequency: float
    massive: MassiveChannels = "keep"
    plain_recall_at_1: float = 0.0

    @property
    def name(self) -> str:
        """The tap and, where they are not kept, what was done to massive channels."""
        return self.tap if self.massive == "keep" else f"{self.tap} ({self.massive})"


def pool_cells(tokens: Tensor, grid: tuple[int, int], cells: int) -> Tensor:
    """Average tokens (B, L, C) over cells × cells places of the grid, at most one per token: (B, cells²·C)."""
    B, _, C = tokens.shape
    maps = tokens.transpose(1, 2).reshape(B, C, *grid)
    size = (min(cells, grid[0]), min(cells, grid[1]))
    return F.adaptive_avg_pool2d(maps, size).flatten(1)


def standardise(features: Array) -> Array:
    """Give every feature of (n, D) mean 0 and variance 1 over the images, so that a few huge channels do not decide."""
    centred = features - features.mean(axis=0)
    deviation = centred.std(axis=0)
    return centred / np.where(deviation > 0, deviation, 1)


def treat_places(features: Array, treatment: ChannelTreatment) -> Array:
    """Pooled features (n, C · places) as a build that treats massive channels would store them; treatment: (1, C)."""
    n, channels = len(features), treatment.offset.shape[1]
    by_place = features.reshape(n, channels, -1).swapaxes(1, 2)[:, None]  # n, T=1, places, C
    return treatment.apply(by_place)[:, 0].swapaxes(1, 2).reshape(n, -1)


def recall_at_1(features: Array, labels: Array) -> float:
    """Share of images whose nearest other image, by cosine, has the same label. features: (n, D); labels: (n,)."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(norms > 0, norms, 1)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return float((labels[similarity.argmax(axis=1)] == labels).mean())


def linear_accuracy(features: Array, labels: Array) -> float:
    """Leave-one-out accuracy of a ridge classifier on one-hot targets: how linearly separable the classes are.

    The kernel form costs n³, not D³; the left-out predictions follow from one solution: with H = K(K + λI)⁻¹ the
    residual without image i is (Y − HY)_i / (1 − H_ii). features: (n, D), standardised; labels: (n,).
    """
    classes, targets = np.unique(labels, return_inverse=True)
    one_hot = np.eye(len(classes))[targets] - 1 / len(classes)
    kernel = features.astype(np.float64) @ features.T.astype(np.float64) / features.shape[1]
    hat = np.linalg.solve(kernel + _RIDGE * np.eye(len(kernel)), kernel)
    left_out = one_hot - (one_hot - hat @ one_hot) / (1 - np.diag(hat))[:, None]
    return float((left_out.argmax(axis=1) == targets).mean())


def high_frequency_ratio(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Share of the spatial energy of tokens (B, L, C) in high frequencies, without the mean: (B,).

    After the criterion of A-SelecT (arXiv 2603.25758): a timestep whose features hold more fine structure tells more.
    Channels count alike, each divided by its own energy. High is what lies beyond half of the highest frequency; that
    bound is ours.
    """
    B, _, C = tokens.shape
    maps = tokens.transpose(1, 2).reshape(B, C, *grid)
    power = torch.fft.fft2(maps).abs().square()  # B, C, H, W
    power[..., 0, 0] = 0
    rows, columns = (torch.fft.fftfreq(n, device=tokens.device).abs() / 0.5 for n in grid)
    high = torch.maximum(rows[:, None], columns[None, :]) > HIGH_FREQUENCY
    total = power.sum(dim=(-2, -1))
    ratio = power[..., high].sum(dim=-1) / torch.where(total > 0, total, torch.ones_like(total))
    return ratio.mean(dim=1)

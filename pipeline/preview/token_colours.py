"""Feature tokens as colours: the three strongest directions of the clearest timestep become red, green and blue.

One coordinate system for all timesteps and samples, so that colours can be compared: what a noisy timestep does not
hold yet of the structure of the clearest one is grey.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

Array = np.ndarray

_FLOOR = 1e-6  # a channel that varies less than this share of the typical one is taken for constant
_PERCENTILE = 98  # of the distance from the mean; a few outliers may be clipped


@dataclass(frozen=True)
class TokenColours:
    """A fitted colouring. mean, deviation: (T, C); axes: (3, C); reach: (3,), how far from grey the colours go."""

    mean: Array
    deviation: Array
    axes: Array
    reach: Array

    def __call__(self, tokens: Array) -> Array:
        """Colour tokens (T, L, C): uint8 (T, L, 3); a direction in which nothing varies is mid-grey."""
        coordinates = _project(tokens, self.mean, self.deviation, self.axes)
        share = 0.5 + 0.5 * np.divide(coordinates, self.reach, out=np.zeros_like(coordinates), where=self.reach > 0)
        return np.rint(255 * np.clip(share, 0, 1)).astype(np.uint8)


def fit_colours(samples: Iterable[Array]) -> TokenColours:
    """Fit a colouring to the tokens of some samples, each (T, L, C), timesteps from the noisiest to the clearest.

    Every channel is centred and divided by its standard deviation first, per timestep: the few channels of a diffusion
    transformer that are a thousand times larger than the others would be the principal components otherwise. Signs
    are fixed (the largest entry of an axis is positive), so that equal features have equal colours.
    """
    tokens = np.concatenate([np.asarray(sample, dtype=np.float64) for sample in samples], axis=1)  # T, n, C
    mean, deviation = tokens.mean(axis=1), tokens.std(axis=1)  # T, C
    typical = np.median(deviation, axis=1, keepdims=True)
    deviation = np.where(deviation > _FLOOR * typical, deviation, np.inf)
    axes = _strongest((tokens[-1] - mean[-1]) / deviation[-1], 3)
    coordinates = _project(tokens, mean, deviation, axes).reshape(-1, 3)
    return TokenColours(mean, deviation, axes, np.percentile(np.abs(coordinates), _PERCENTILE, axis=0))


def _project(tokens: Array, mean: Array, deviation: Array, axes: Array) -> Array:
    return ((tokens - mean[:, None]) / deviation[:, None]) @ axes.T  # T, L, 3


def _strongest(x: Array, count: int) -> Array:
    """The `count` strongest principal axes of x (n, C), strongest first: (count, C); zeros where there are fewer."""
    n, C = x.shape
    found = min(count, n, C)
    # Of the two Gram matrices the smaller: n is some thousand where C may be 3072.
    small = x.T @ x if n >= C else x @ x.T
    _, vectors = eigh(small, subset_by_index=(len(small) - found, len(small) - 1))
    axes = vectors.T if n >= C else vectors.T @ x  # ascending, found × C
    norms = np.linalg.norm(axes, axis=1, keepdims=True)
    axes = np.divide(axes, norms, out=np.zeros_like(axes), where=norms > 0)[::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1)
    return np.concatenate([np.where(largest < 0, -axes, axes), np.zeros((count - found, C))])

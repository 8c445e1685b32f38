"""Massive channels: the few of a diffusion transformer that are many times larger than the others, at every token.

They say little about a place and drown what says more (DiTF, arXiv 2505.18584, which names them by hand). A channel is
massive here if its root mean square over the calibration tokens, after pooling, is at least `factor` times the median
of the channels at one of the timesteps. It is removed, which leaves zeros so that shapes stay as they are, or
standardised: mean 0 and the median deviation of the other channels, at every timestep by itself.
"""

from dataclasses import dataclass

import numpy as np

from cache_schema.encoding.number_formats import Array, FloatArray
from cache_schema.format.vocabulary import MassiveChannels


@dataclass(frozen=True)
class ChannelTreatment:
    """What becomes of the channels before they are stored: (x - offset) * factor; float32 (T, C) both.

    Channels that are kept have offset 0 and factor 1, removed ones factor 0.
    """

    offset: Array
    factor: Array

    @property
    def channels(self) -> list[int]:
        """The channels that are not kept as they are, ascending."""
        return np.flatnonzero(((self.offset != 0) | (self.factor != 1)).any(axis=0)).tolist()

    def apply(self, features: FloatArray) -> FloatArray:
        """Return features (..., T, L, C) as float32 after the treatment; the input is left as it is."""
        treated = np.array(features, dtype=np.float32)
        chosen = self.channels
        shifted = treated[..., chosen] - self.offset[:, None, chosen]
        treated[..., chosen] = shifted * self.factor[:, None, chosen]
        return treated


def find_massive(amplitudes: Array, factor: float) -> Array:
    """Say of every channel, (C,), whether it is massive; amplitudes: root mean squares (T, C).

    Silent channels do not count for the median.
    """
    massive = np.zeros(amplitudes.shape[1], dtype=bool)
    for row in amplitudes:
        heard = row[row > 0]
        if heard.size:
            massive |= row >= factor * np.median(heard)
    return massive


def treatment_of(means: Array, squares: Array, kind: MassiveChannels, factor: float) -> ChannelTreatment:
    """Return what is done to the channels; means, squares: of their values and their squares, (T, C) both."""
    massive = find_massive(np.sqrt(squares), factor)
    offsets, factors = np.zeros(squares.shape, np.float32), np.ones(squares.shape, np.float32)
    if kind == "remove":
        factors[:, massive] = 0
    elif kind == "standardize":
        deviations = np.sqrt(np.maximum(squares - np.square(means), 0))
        ordinary = deviations[:, ~massive]
        typical = np.median(ordinary, axis=1, keepdims=True) if ordinary.size else np.ones((len(squares), 1))
        own = deviations[:, massive]
        offsets[:, massive] = means[:, massive]
        # A channel that never varies says nothing: it becomes zeros.
        factors[:, massive] = np.where(own > 0, typical / np.where(own > 0, own, 1), 0)
    return ChannelTreatment(offsets, factors)

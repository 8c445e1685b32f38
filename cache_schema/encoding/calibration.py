"""The statistics that an encoding needs before the first features can be stored, in one pass over some of them.

Everything follows from second moments, so that no more than one batch need be in memory: of every channel for scales,
of every pair of channels for PCA (T x C x C numbers of 8 bytes per tap: 300 MB at 4 timesteps of 3072 channels).
Samples are added one by one, so that the result does not depend on how they were batched.
"""

import numpy as np

from cache_schema.encoding.massive import ChannelTreatment, treatment_of
from cache_schema.encoding.number_formats import Array, FloatArray
from cache_schema.encoding.reduction import PrincipalComponents, pool_tokens
from cache_schema.errors import InvalidFeatures
from cache_schema.format.layout import CalibrationPart
from cache_schema.format.manifest import Manifest
from cache_schema.format.vocabulary import MassiveChannels

# A channel that is silent in the calibration rows may speak up later. Giving it less than this share of the typical
# amplitude would let such a value take the whole range of its token's scale.
_CHANNEL_FLOOR = 1e-3


class Moments:
    """Sums over tokens of the features of one tap, per timestep; those of pairs of channels only where asked for."""

    def __init__(self, timesteps: int, channels: int, pairs: bool = False) -> None:
        self._count = 0
        self._sums = np.zeros((timesteps, channels))
        self._squares = np.zeros((timesteps, channels))
        self._products = np.zeros((timesteps, channels, channels)) if pairs else None

    def add(self, sample: FloatArray) -> None:
        """Add the features of one sample, (V, T, L, C)."""
        self._count += sample.shape[0] * sample.shape[2]
        for t in range(sample.shape[1]):
            tokens = sample[:, t].reshape(-1, sample.shape[-1]).astype(np.float64)
            self._sums[t] += tokens.sum(axis=0)
            self._squares[t] += np.square(tokens).sum(axis=0)
            if self._products is not None:
                self._products[t] += tokens.T @ tokens

    def channel_amplitudes(self) -> Array:
        """Return the calibrated amplitude of every channel at every timestep, float32 (T, C).

        The amplitude is the root mean square: it spreads the rounding error over channels in proportion to their own
        energy, however different these are. Silent channels get a small share of the typical amplitude.
        """
        return _amplitudes(self._squares / self._counted())

    def principal_components(self, count: int) -> PrincipalComponents:
        """Return the `count` strongest components of the channels over all timesteps, strongest first."""
        assert self._products is not None
        tokens = self._counted() * len(self._squares)
        amplitude = _amplitudes(self._squares.sum(axis=0, keepdims=True) / tokens)[0]
        mean, second = _normalised(self._sums.sum(axis=0), self._products.sum(axis=0), amplitude, tokens)
        _, vectors = np.linalg.eigh(second - np.outer(mean, mean))
        basis = vectors[:, ::-1].T[:count]
        # An eigenvector is one up to its sign: the largest entry is made positive.
        largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
        basis = np.where(largest < 0, -basis, basis)
        return PrincipalComponents(amplitude, mean.astype(np.float32), basis.astype(np.float32))

    def coordinate_amplitudes(self, components: PrincipalComponents) -> Array:
        """Return the calibrated amplitude of every coordinate at every timestep, float32 (T, K)."""
        assert self._products is not None
        mean, basis = components.mean.astype(np.float64), components.basis.astype(np.float64)
        squares = []
        for sums, products in zip(self._sums, self._products, strict=True):
            first, second = _normalised(sums, products, components.amplitude, self._counted())
            cross = np.outer(first, mean)
            squares.append(((basis @ (second - cross - cross.T + np.outer(mean, mean))) * basis).sum(axis=1))
        # Where nothing varies, rounding may leave less than nothing.
        return _amplitudes(np.maximum(np.array(squares), 0.0))

    def treatment(self, kind: MassiveChannels, factor: float) -> ChannelTreatment:
        """Return what becomes of the channels where massive ones are not kept."""
        counted = self._counted()
        return treatment_of(self._sums / counted, self._squares / counted, kind, factor)

    def treated(self, treatment: ChannelTreatment) -> "Moments":
        """Return the sums over the tokens after a treatment, which follow from these."""
        offset, factor = treatment.offset.astype(np.float64), treatment.factor.astype(np.float64)
        after = Moments(*self._sums.shape)
        after._count = self._count
        after._sums = (self._sums - self._count * offset) * factor
        shifted = self._squares - 2 * offset * self._sums + self._count * np.square(offset)
        # Where nothing varies, rounding may leave less than nothing.
        after._squares = np.maximum(shifted, 0) * np.square(factor)
        if self._products is not None:
            after._products = np.empty_like(self._products)
            for t, products in enumerate(self._products):
                cross = np.outer(self._sums[t], offset[t])
                both = products - cross - cross.T + self._count * np.outer(offset[t], offset[t])
                after._products[t] = both * np.outer(factor[t], factor[t])
        return after

    def _counted(self) -> int:
        if not self._count:
            raise InvalidFeatures("calibration needs at least one sample")
        return self._count


class Calibrator:
    """Collects the statistics of every tap of a cache that is about to be written."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        pairs = manifest.encoding.pca is not None
        steps = len(manifest.curriculum.timesteps)
        self._moments = {tap.name: Moments(steps, tap.teacher_channels or tap.channels, pairs) for tap in manifest.taps}

    def add(self, tap: str, features: FloatArray) -> None:
        """Add features of one tap as the teacher computed them: (n, V, T, L, C), finite."""
        info = self._manifest.tap(tap)
        assert info is not None
        for sample in features:
            self._moments[tap].add(pool_tokens(sample, info.grid, self._manifest.encoding.pool))

    def finish(self, tap: str) -> dict[CalibrationPart, Array]:
        """Return the arrays to be stored for one tap; raises InvalidFeatures if there is nothing to tell from."""
        moments, encoding = self._moments[tap], self._manifest.encoding
        arrays: dict[CalibrationPart, Array] = {}
        if encoding.massive_factor is not None:
            treatment = moments.treatment(encoding.massive, encoding.massive_factor)
            arrays = {"offset": treatment.offset, "factor": treatment.factor}
            moments = moments.treated(treatment)
        if encoding.pca is None:
            return arrays | ({"channel": moments.channel_amplitudes()} if encoding.scaled else {})
        components = moments.principal_components(encoding.pca)
        arrays |= {"amplitude": components.amplitude, "mean": components.mean, "basis": components.basis}
        if encoding.scaled:
            arrays["channel"] = moments.coordinate_amplitudes(components)
        return arrays


def _normalised(sums: Array, products: Array, amplitude: Array, tokens: int) -> tuple[Array, Array]:
    """Return the first (C,) and second (C, C) moments of the channels divided by their amplitudes."""
    wide = amplitude.astype(np.float64)
    return sums / wide / tokens, products / np.outer(wide, wide) / tokens


def _amplitudes(mean_squares: Array) -> Array:
    """Return root mean squares (T, C) as float32, none of them much smaller than is typical for its timestep."""
    channel = np.sqrt(mean_squares)
    for t, amplitudes in enumerate(channel):
        heard = amplitudes[amplitudes > 0]
        typical = float(np.median(heard)) if heard.size else 1.0
        channel[t] = np.maximum(amplitudes, max(typical * _CHANNEL_FLOOR, float(np.finfo(np.float32).tiny)))
    if not np.isfinite(channel).all() or channel.max() > np.finfo(np.float32).max:
        raise InvalidFeatures("calibration features are not finite")
    return channel.astype(np.float32)

"""Making features smaller before they become numbers of a few bits: pooling of tokens, PCA of channels.

First the mean over `pool` x `pool` neighbours on the grid of tokens, then the coordinates in a basis of the strongest
principal components. Shapes are those of a sample: (V, T, L, C), tokens in rows of the grid, from top left.
"""

from dataclasses import dataclass

import numpy as np

from cache_schema.encoding.number_formats import Array, FloatArray
from cache_schema.errors import InvalidEncoding, InvalidFeatures
from cache_schema.format.manifest import Encoding, TapInfo


@dataclass(frozen=True)
class PrincipalComponents:
    """The coordinate system of a tap, the same for all its timesteps, so that one input projection reads them all.

    Channels are divided by `amplitude` (C,), their root mean square, before the `mean` (C,) of the result is taken off
    and it is projected on the rows of the orthonormal `basis` (K, C): otherwise the few channels that are a thousand
    times larger than the others would be the principal components. All float32.
    """

    amplitude: Array
    mean: Array
    basis: Array

    def project(self, features: FloatArray) -> Array:
        """Return the coordinates (V, T, L, K), float32, of features (V, T, L, C); raises InvalidFeatures."""
        coordinates = np.empty((*features.shape[:-1], len(self.basis)), dtype=np.float32)
        for chunk in np.ndindex(features.shape[:2]):
            with np.errstate(over="ignore", invalid="ignore"):
                normalised = features[chunk].astype(np.float32) / self.amplitude - self.mean
                np.matmul(normalised, self.basis.T, out=coordinates[chunk])
        if not np.isfinite(coordinates).all():
            raise InvalidFeatures("a value is beyond the range of its channel's calibration; calibrate on more samples")
        return coordinates

    def restore(self, coordinates: Array) -> Array:
        """Return the features (..., C) that coordinates (..., K) stand for."""
        return (coordinates @ self.basis + self.mean) * self.amplitude


def pool_tokens(features: FloatArray, grid: tuple[int, int], pool: int) -> FloatArray:
    """Return the mean over `pool` x `pool` tokens: (..., L * pool², C) to (..., L, C), `grid` the one that remains."""
    if pool == 1:
        return features
    height, width = grid
    apart = features.reshape(*features.shape[:-2], height, pool, width, pool, features.shape[-1])
    total = np.zeros((*features.shape[:-2], height, width, features.shape[-1]), dtype=np.float32)
    with np.errstate(over="ignore"):
        for row, column in np.ndindex(pool, pool):
            total += apart[..., :, row, :, column, :]
        total /= pool * pool
    return total.reshape(*features.shape[:-2], height * width, features.shape[-1])


def stored_tap(tap: TapInfo, encoding: Encoding) -> TapInfo:
    """Return a tap in the shape in which it is stored, from the shape in which the teacher computes it.

    Raises InvalidEncoding for a grid that cannot be pooled and for more components than channels.
    """
    if tap.teacher_channels is not None:
        raise ValueError(f"tap {tap.name} is reduced already")
    (height, width), pool = tap.grid, encoding.pool
    if height % pool or width % pool:
        raise InvalidEncoding(
            f"the {height}x{width} tokens of tap {tap.name} cannot be pooled {pool}x{pool}: {pool} divides "
            f"{'neither side' if height % pool and width % pool else 'only one side'}; choose another pool"
        )
    if encoding.pca is not None and encoding.pca > tap.channels:
        raise InvalidEncoding(
            f"tap {tap.name} has {tap.channels} channels, which have no {encoding.pca} principal components; "
            f"choose pca {tap.channels} or less"
        )
    return TapInfo(
        name=tap.name,
        tokens=tap.tokens // (pool * pool),
        channels=encoding.pca or tap.channels,
        grid=(height // pool, width // pool),
        teacher_channels=None if encoding.pca is None else tap.channels,
    )


def teacher_shape(tap: TapInfo, encoding: Encoding) -> tuple[int, int]:
    """Return (tokens, channels) of a stored tap's features as the teacher computes them."""
    return tap.tokens * encoding.pool**2, tap.teacher_channels or tap.channels

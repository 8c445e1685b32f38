"""How much an encoding lost: sums kept by every shard's journal record, merged when the cache is sealed."""

import math

import numpy as np

from cache_schema.encoding import Array, FloatArray
from cache_schema.journal import FidelitySums
from cache_schema.manifest import Fidelity

# Samples measured per shard: enough over all shards, and cheap beside encoding the rest.
MEASURED_SAMPLES = 2


def measure(tap: str, timestep: int, original: FloatArray, decoded: Array) -> FidelitySums:
    """Compare features (n, L, C) of one tap and timestep with what their encoding decodes to."""
    x, y = original.astype(np.float64), decoded.astype(np.float64)
    xx, yy, xy = (x * x).sum(axis=-1), (y * y).sum(axis=-1), (x * y).sum(axis=-1)  # (n, L)
    norm = np.sqrt(xx) * np.sqrt(yy)
    both_zero = (xx == 0) & (yy == 0)
    cosine = np.where(both_zero, 1.0, np.divide(xy, norm, out=np.zeros_like(xy), where=norm > 0))
    cosine = np.minimum(cosine, 1.0)
    squared_error = np.square(x - y)
    channel_energy = (x * x).sum(axis=(0, 1))  # (C,)
    channel_loss = np.divide(
        squared_error.sum(axis=(0, 1)),
        channel_energy,
        out=np.zeros_like(channel_energy),
        where=channel_energy > 0,
    )
    return FidelitySums(
        tap=tap,
        timestep=timestep,
        tokens=cosine.size,
        cosine_sum=float(cosine.sum()),
        cosine_min=float(cosine.min()),
        squared_error=float(squared_error.sum()),
        energy=float(xx.sum()),
        channel_error=float(channel_loss.mean()),
    )


def merge(sums: list[FidelitySums]) -> list[Fidelity]:
    """Merge the sums of all shards into one figure per (tap, timestep), in the order of first appearance."""
    groups: dict[tuple[str, int], list[FidelitySums]] = {}
    for item in sums:
        groups.setdefault((item.tap, item.timestep), []).append(item)
    return [_merge_group(tap, timestep, group) for (tap, timestep), group in groups.items()]


def _merge_group(tap: str, timestep: int, group: list[FidelitySums]) -> Fidelity:
    tokens = sum(item.tokens for item in group)
    error, energy = (math.fsum(values) for values in zip(*((i.squared_error, i.energy) for i in group), strict=True))
    return Fidelity(
        tap=tap,
        timestep=timestep,
        cosine_mean=math.fsum(item.cosine_sum for item in group) / tokens,
        cosine_min=min(item.cosine_min for item in group),
        relative_error=math.sqrt(error / energy) if energy > 0 else 0.0,
        channel_error=math.sqrt(math.fsum(item.channel_error * item.tokens for item in group) / tokens),
    )

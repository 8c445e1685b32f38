"""How much an encoding lost: sums kept by every shard's journal record, merged when the cache is sealed.

What is compared with what: see `cache_schema.format.manifest.Fidelity`.
"""

import math

import numpy as np

from cache_schema.encoding.number_formats import Array, FloatArray
from cache_schema.errors import CacheCorrupt, LowFidelity
from cache_schema.format.journal import FidelitySums
from cache_schema.format.manifest import Fidelity

# Samples measured per shard: enough over all shards, and cheap beside encoding the rest.
MEASURED_SAMPLES = 2


def measure(tap: str, timestep: int, original: FloatArray, decoded: Array) -> FidelitySums:
    """Compare features (n, L, C) of one tap and timestep with what came back from their encoding."""
    from cache_schema.encoding.compiled import compare_tokens

    C = original.shape[-1]
    x, y = (_comparable(features).reshape(-1, C) for features in (original, decoded))
    xx, yy, xy = tokens = np.empty((3, len(x)))
    channel_energy, channel_error = channels = np.zeros((2, C))
    compare_tokens(x, y, tokens, channels)
    norm = np.sqrt(xx) * np.sqrt(yy)
    both_zero = (xx == 0) & (yy == 0)
    cosine = np.where(both_zero, 1.0, np.divide(xy, norm, out=np.zeros_like(xy), where=norm > 0))
    cosine = np.minimum(cosine, 1.0)
    heard = channel_energy > 0
    channel_loss = np.divide(channel_error, channel_energy, out=np.zeros_like(channel_energy), where=heard)
    return FidelitySums(
        tap=tap,
        timestep=timestep,
        tokens=cosine.size,
        cosine_sum=float(cosine.sum()),
        cosine_min=float(cosine.min()),
        squared_error=float(channel_error.sum()),
        energy=float(xx.sum()),
        channel_error=float(channel_loss.mean()),
    )


def _comparable(features: FloatArray) -> FloatArray:
    """Return contiguous features of a type that can be compiled for."""
    return np.ascontiguousarray(features, dtype=np.float64 if features.dtype == np.float64 else np.float32)


def combine(sums: list[FidelitySums]) -> list[FidelitySums]:
    """Combine the sums of any number of shards into one per (tap, timestep), in the order of first appearance."""
    groups: dict[tuple[str, int], list[FidelitySums]] = {}
    for item in sums:
        groups.setdefault((item.tap, item.timestep), []).append(item)
    return [_combine_group(tap, timestep, group) for (tap, timestep), group in groups.items()]


def _combine_group(tap: str, timestep: int, group: list[FidelitySums]) -> FidelitySums:
    tokens = sum(item.tokens for item in group)
    return FidelitySums(
        tap=tap,
        timestep=timestep,
        tokens=tokens,
        cosine_sum=math.fsum(item.cosine_sum for item in group),
        cosine_min=min(item.cosine_min for item in group),
        squared_error=math.fsum(item.squared_error for item in group),
        energy=math.fsum(item.energy for item in group),
        channel_error=math.fsum(item.channel_error * item.tokens for item in group) / tokens,
    )


def merge(sums: list[FidelitySums]) -> list[Fidelity]:
    """Return the figures of all shards together, one per (tap, timestep), in the order of first appearance.

    Raises CacheCorrupt where the sums, each valid, are none that any features have together.
    """
    try:
        return [_figures(item) for item in combine(sums)]
    except (OverflowError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CacheCorrupt(f"what the journal says about fidelity cannot have been measured: {reason}") from error


def _figures(item: FidelitySums) -> Fidelity:
    return Fidelity(
        tap=item.tap,
        timestep=item.timestep,
        cosine_mean=item.cosine_sum / item.tokens,
        cosine_min=item.cosine_min,
        relative_error=math.sqrt(item.squared_error / item.energy) if item.energy > 0 else 0.0,
        channel_error=math.sqrt(item.channel_error),
    )


def require_cosine(figures: list[Fidelity], min_cosine: float, cache: str, tolerance: float = 1.0) -> None:
    """Raise LowFidelity if a tap and timestep loses more than `tolerance` times what `min_cosine` allows.

    What is lost is 1 - cosine, by the mean over tokens; `cache` names the cache in the message.
    """
    worst = min(figures, key=lambda item: item.cosine_mean, default=None)
    if worst is None or 1 - worst.cosine_mean <= tolerance * (1 - min_cosine):
        return
    raise LowFidelity(
        f"tap {worst.tap} at timestep {worst.timestep} of cache {cache} keeps a mean cosine of "
        f"{worst.cosine_mean:.6f}, {min_cosine} is asked for; build with a wider encoding (bfloat16) or more PCA "
        "components, or ask for less"
    )

"""Which images, noise and σ a step of Stage I sees: a pure function of (seed, step): a run can stop anywhere."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cache_schema.loading.sampler import StreamSampler
from pipeline.curriculum import keyed_generator
from pipeline.refine.config import SigmaDistribution


def rows_of(seed: int, step: int, slot: int, slots: int, batch: int, count: int) -> list[int]:
    """Rows of one micro-batch: every epoch is a fresh permutation of `count` images, nothing left out.

    step counts from 0; slot numbers the micro-batches of one step over processes and accumulation steps, so that two
    processes see what one process with twice the accumulation sees.
    """
    return _order(seed, batch, count).batch(step * slots + slot).tolist()


def noise_of(
    seed: int,
    step: int,
    slot: int,
    shape: tuple[int, ...],
    distribution: SigmaDistribution = "uniform",
    schedule: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """ε of `shape` (B, L, C), standard normal, and σ (B,), both float32. schedule: as of `sigma_of`."""
    generator = keyed_generator(seed, "noise", step, slot)
    noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return noise, torch.from_numpy(sigma_of(generator, shape[0], distribution, schedule))


def sigma_of(
    generator: np.random.Generator, count: int, distribution: SigmaDistribution, schedule: Sequence[float]
) -> np.ndarray:
    """Draw σ (count,), float32, on (0, 1).

    uniform, as in L_CDR; logit-normal, σ = 1 / (1 + e^−n) with n standard normal (Esser et al., arXiv 2403.03206);
    shifted, as often as the sampler is there: uniform places on its `schedule` of σ, noisiest first.
    """
    if distribution == "logit-normal":
        return (1 / (1 + np.exp(-generator.standard_normal(count)))).astype(np.float32)
    drawn = generator.random(count, dtype=np.float32)
    if distribution == "uniform":
        return drawn
    places = np.linspace(0, 1, len(schedule) + 1)
    return np.interp(drawn, places, [0.0, *reversed(schedule)]).astype(np.float32)


def chosen_of(seed: int, what: str, step: int, slot: int, batch: int, share: float) -> list[bool]:
    """Which images of a micro-batch something happens to that happens to a share of them."""
    return (keyed_generator(seed, what, step, slot).random(batch) < share).tolist()


@lru_cache(maxsize=1)
def _order(seed: int, batch: int, count: int) -> StreamSampler:
    return StreamSampler(np.arange(count), batch, seed)

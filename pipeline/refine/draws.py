"""Which images, noise and σ a step of Stage I sees: a pure function of (seed, step): a run can stop anywhere."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cache_schema.loading.sampler import StreamSampler
from pipeline.curriculum import keyed_generator


def rows_of(seed: int, step: int, slot: int, slots: int, batch: int, count: int) -> list[int]:
    """Rows of one micro-batch: every epoch is a fresh permutation of `count` images, nothing left out.

    step counts from 0; slot numbers the micro-batches of one step over processes and accumulation steps, so that two
    processes see what one process with twice the accumulation sees.
    """
    return _order(seed, batch, count).batch(step * slots + slot).tolist()


def noise_of(seed: int, step: int, slot: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """ε of `shape` (B, L, C), standard normal, and σ (B,), uniform on (0, 1), both float32."""
    generator = keyed_generator(seed, "noise", step, slot)
    noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return noise, torch.from_numpy(generator.random(shape[0], dtype=np.float32))


@lru_cache(maxsize=1)
def _order(seed: int, batch: int, count: int) -> StreamSampler:
    return StreamSampler(np.arange(count), batch, seed)

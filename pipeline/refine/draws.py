"""Which images, noise and σ a step of Stage I sees: a pure function of (seed, step): a run can stop anywhere."""

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def rows_of(seed: int, step: int, slot: int, slots: int, batch: int, count: int) -> list[int]:
    """Rows of one micro-batch: every epoch is a fresh permutation of `count` images, nothing left out.

    step counts from 0; slot numbers the micro-batches of one step over processes and accumulation steps, so that two
    processes see what one process with twice the accumulation sees.
    """
    first = (step * slots + slot) * batch
    return [int(_permutation(seed, n // count, count)[n % count]) for n in range(first, first + batch)]


def noise_of(seed: int, step: int, slot: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """ε of `shape` (B, L, C), standard normal, and σ (B,), uniform on (0, 1), both float32."""
    generator = _generator(seed, "noise", step, slot)
    noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return noise, torch.from_numpy(generator.random(shape[0], dtype=np.float32))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return _generator(seed, "order", epoch).permutation(count)


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))

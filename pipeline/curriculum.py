"""Which noise levels are visited, and with which noise: the curriculum of DiT-Distill (CVPR 2026)."""

import hashlib
from typing import TYPE_CHECKING

from cache_schema.errors import DitDistillError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DEFAULT_STEPS = 28
DEFAULT_TIMESTEPS = (10, 16, 22, 28)


def check_timesteps(timesteps: list[int], num_steps: int) -> None:
    """Raise unless 1 ≤ p ≤ T for every p, in ascending order without repeats (p = 1 is the noisiest)."""
    if not timesteps:
        raise DitDistillError("--timesteps is empty; name at least one of 1 to " + str(num_steps))
    for p in timesteps:
        if not 1 <= p <= num_steps:
            raise DitDistillError(
                f"timestep {p} is outside 1–{num_steps} (1 is the noisiest, {num_steps} the clearest)"
            )
    if sorted(set(timesteps)) != list(timesteps):
        raise DitDistillError(f"timesteps {timesteps} must be ascending and without repeats")


def keyed_generator(*key: object) -> "np.random.Generator":
    """A random generator that is a pure function of `key`, whatever was drawn before."""
    import numpy as np

    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def sample_noise(sample_id: str, view: str, seed: int, shape: tuple[int, ...]) -> "Tensor":
    """The noise ε of one image: standard normal float32 of `shape`, the same for every timestep and on every machine.

    Keyed by (cache seed, sample id, view). NumPy's counter-based Philox generator is specified bit by bit, unlike
    torch.randn, whose stream depends on the device and on the vector width of the CPU.
    """
    import numpy as np
    import torch

    generator = keyed_generator(seed, sample_id, view)
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def add_noise(clean: "Tensor", noise: "Tensor", sigma: "Tensor") -> "Tensor":
    """X_t = t·z + (1 − t)·ε with t = 1 − σ. clean, noise: (B, L, C); sigma: (B,). Returns (B, L, C)."""
    s = sigma.to(clean.dtype).view(-1, 1, 1)
    return (1 - s) * clean + s * noise

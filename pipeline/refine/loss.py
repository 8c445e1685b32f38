"""L_CDR and its value on held-out images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cache_schema.errors import DitDistillError
from pipeline.curriculum import add_noise, sample_noise
from pipeline.datasets.base import Sample
from pipeline.inputs.condition_store import ConditionStore
from pipeline.inputs.conditions import Conditions
from pipeline.teachers.base import Teacher

_VALIDATION_BATCH = 8


def cdr_loss(teacher: Teacher, conditions: Conditions, noise: Tensor, sigma: Tensor) -> Tensor:
    """L_CDR = E‖(z_O − ε) − E_{O,t}‖², the mean over object tokens and channels; context tokens carry no loss.

    noise: (B, L, C_latent); sigma: (B,).
    """
    noisy = add_noise(conditions.object, noise, sigma)
    predicted = teacher.predict(noisy, conditions.context, sigma, conditions.text)
    return F.mse_loss(predicted.float(), (conditions.object - noise).float())


def hold_out(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Split evenly spaced images off for validation. Raises if too few are left to train on."""
    if len(samples) < 2:
        raise DitDistillError(f"refining needs at least 2 training images, the data set has {len(samples)}")
    count = min(count, len(samples) // 2)
    chosen = {round(i * len(samples) / count) for i in range(count)}
    return [s for i, s in enumerate(samples) if i not in chosen], [samples[i] for i in sorted(chosen)]


@dataclass(frozen=True)
class HeldOut:
    """Held-out images with one fixed noise and σ each, so that progress shows through the noise of the objective."""

    conditions: Conditions
    noise: Tensor
    sigma: Tensor


def read_held_out(store: ConditionStore, samples: Sequence[Sample], seed: int, device: torch.device) -> list[HeldOut]:
    """Held-out images, prepared in `store`, in batches; σ evenly spread over (0, 1)."""
    batches = []
    for start in range(0, len(samples), _VALIDATION_BATCH):
        part = samples[start : start + _VALIDATION_BATCH]
        conditions = store.read(part, "canonical").to(device)
        shape = tuple(conditions.object.shape[1:])
        noise = torch.stack([sample_noise(s.id, "validation", seed, shape) for s in part]).to(conditions.object)
        sigma = torch.tensor([(start + i + 0.5) / len(samples) for i in range(len(part))]).to(conditions.object.device)
        batches.append(HeldOut(conditions, noise, sigma))
    return batches


@torch.no_grad()
def validation_loss(teacher: Teacher, batches: Sequence[HeldOut]) -> float:
    """Mean L_CDR of held-out images."""
    losses = [(cdr_loss(teacher, b.conditions, b.noise, b.sigma).item(), len(b.sigma)) for b in batches]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

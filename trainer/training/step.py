"""One update of a run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.data.batches import Batch
from trainer.device import autocast
from trainer.errors import TrainError
from trainer.methods.method import Method, Moment
from trainer.training.optim import set_learning_rate


def train_step(
    method: Method, optimizer: torch.optim.Optimizer, batch: Batch, rate: float, config: TrainConfig, moment: Moment
) -> dict[str, Tensor]:
    """Update all parameters once, at learning rate `rate`; returns the losses before it.

    Randomness inside the modules (masks, stochastic depth) depends on the seed and the update alone: a resumed run
    draws what the uninterrupted one would have drawn.
    """
    torch.manual_seed((config.seed << 32) + moment.update)
    method.train()
    with autocast(batch.images.device, config.precision):
        losses = method(batch, moment)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    if config.optim.grad_clip:
        torch.nn.utils.clip_grad_norm_(method.parameters(), config.optim.grad_clip)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    return losses


def finite_losses(losses: dict[str, Tensor], update: int, advice: str) -> dict[str, float]:
    """The losses as numbers; raises TrainError with the method's advice if the total is not finite."""
    values = {name: value.item() for name, value in losses.items()}
    if not math.isfinite(values["loss"]):
        parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise TrainError(f"the loss is not finite at update {update} ({parts}); {advice}")
    return values

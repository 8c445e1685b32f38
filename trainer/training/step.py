"""One update of a run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.data.batches import Batch
from trainer.device import autocast
from trainer.errors import TrainError
from trainer.methods.objective import Objective
from trainer.training.optim import set_learning_rate


def train_step(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rate: float,
    config: TrainConfig,
    update: int,
    ramp: float = 1.0,
) -> dict[str, Tensor]:
    """Update all parameters once, at learning rate `rate` and with α scaled by `ramp`; returns the losses before it.

    Randomness inside the modules (masks, stochastic depth) depends on the seed and the update alone: a resumed run
    draws what the uninterrupted one would have drawn.
    """
    torch.manual_seed((config.seed << 32) + update)
    objective.train()
    with autocast(batch.images.device, config.precision):
        losses = objective(batch, ramp)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    if config.optim.grad_clip:
        torch.nn.utils.clip_grad_norm_(objective.parameters(), config.optim.grad_clip)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    return losses


def finite_losses(losses: dict[str, Tensor], update: int) -> dict[str, float]:
    """The losses as numbers; raises TrainError with advice if the total is not finite."""
    values = {name: value.item() for name, value in losses.items()}
    if not math.isfinite(values["loss"]):
        parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise TrainError(
            f"the loss is not finite at update {update} ({parts}); lower --lr or --alpha, set optim.grad_clip=1, "
            "or use loss.cal=normalized"
        )
    return values

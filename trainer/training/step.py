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
    optimizer.zero_grad(set_to_none=True)
    losses = _backward(method, batch, config, moment)
    if config.optim.grad_clip:
        torch.nn.utils.clip_grad_norm_(method.parameters(), config.optim.grad_clip)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    return losses


def _backward(method: Method, batch: Batch, config: TrainConfig, moment: Moment) -> dict[str, Tensor]:
    """Add the gradients of a batch, part by part where `optim.accumulate` says so; returns its losses.

    Losses are means over images, so equal parts have the batch's own mean. What looks at the batch as a whole (batch
    norm, losses between images) sees the part instead.
    """
    count = config.optim.accumulate
    losses: dict[str, Tensor] = {}
    for part in [batch] if count == 1 else batch.split(count):
        with autocast(batch.images.device, config.precision):
            found = method(part, moment)
        (found["loss"] if count == 1 else found["loss"] / count).backward()
        for name, value in found.items():
            losses[name] = value.detach() if count == 1 else losses.get(name, 0.0) + value.detach() / count
    return losses


def finite_losses(losses: dict[str, Tensor], update: int, advice: str) -> dict[str, float]:
    """The losses as numbers; raises TrainError with the method's advice if the total is not finite."""
    values = {name: value.item() for name, value in losses.items()}
    if not math.isfinite(values["loss"]):
        parts = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise TrainError(f"the loss is not finite at update {update} ({parts}); {advice}")
    return values

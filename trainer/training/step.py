"""One update of a run."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trainer import processes
from trainer.config import TrainConfig
from trainer.data.batch import Batch
from trainer.device import autocast
from trainer.methods.method import Method, Moment
from trainer.training.optim import set_learning_rate


class LossNotFiniteError(Exception):
    """A loss of which nothing can be learnt; the weights are as they were before its update.

    Of several processes all stop, with the losses that each has.
    """

    def __init__(self, losses: dict[str, Tensor]):
        super().__init__("the loss is not finite")
        self.losses = losses


class _Finite:
    """Whether a loss is finite, known as soon as it is computed: a device goes on with what it was given after it."""

    def __init__(self, loss: Tensor):
        self._flag = loss.detach().isfinite().to("cpu", non_blocking=True)
        self._computed = torch.cuda.Event() if loss.is_cuda else None
        if self._computed is not None:
            self._computed.record()

    def __bool__(self) -> bool:
        if self._computed is not None:
            self._computed.synchronize()
        return bool(self._flag)


def seed_update(config: TrainConfig, moment: Moment) -> None:
    """Make what modules draw (masks, stochastic depth) depend on the seed and the update alone, and on the process."""
    torch.manual_seed((config.seed << 32) + (processes.number() << 24) + moment.update)


def train_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rate: float,
    config: TrainConfig,
    moment: Moment,
    wrapped: Any = None,
) -> dict[str, Tensor]:
    """Update all parameters once, at learning rate `rate`; returns the losses before it.

    A resumed run draws at random what the uninterrupted one would have drawn. Raises LossNotFiniteError before any
    weight has changed. `wrapped` is the method with gradients averaged over processes, where there are several.
    """
    seed_update(config, moment)
    method.train()
    optimizer.zero_grad(set_to_none=True)
    losses = _backward(method, batch, config, moment, wrapped)
    if config.optim.grad_clip:
        torch.nn.utils.clip_grad_norm_(method.parameters(), config.optim.grad_clip)
    set_learning_rate(optimizer, rate)
    optimizer.step()
    return losses


def parts_of(batch: Batch, config: TrainConfig) -> Iterable[Batch]:
    """What a batch is cut into, where `optim.accumulate` says so."""
    return [batch] if config.optim.accumulate == 1 else batch.split(config.optim.accumulate)


def _backward(
    method: Method, batch: Batch, config: TrainConfig, moment: Moment, wrapped: Any = None
) -> dict[str, Tensor]:
    """Add the gradients of a batch, part by part; returns its losses.

    Losses are means over images, so equal parts have the batch's own mean. What looks at the batch as a whole (batch
    norm, losses between images) sees the part instead. Raises LossNotFiniteError.
    """
    count = config.optim.accumulate
    losses: dict[str, Tensor] = {}
    finite = []
    for number, part in enumerate(parts_of(batch, config), 1):
        # Gradients are averaged over processes once, with those of the last part.
        with nullcontext() if wrapped is None or number == count else wrapped.no_sync():
            with autocast(batch.images.device, config.precision, method.student):
                found = (wrapped or method)(part, moment)
            finite.append(_Finite(found["loss"]))
            (found["loss"] if count == 1 else found["loss"] / count).backward()
        for name, value in found.items():
            losses[name] = value.detach() if count == 1 else losses.get(name, 0.0) + value.detach() / count
    if processes.any_of(not all(finite), batch.images.device):
        raise LossNotFiniteError(losses)
    return losses

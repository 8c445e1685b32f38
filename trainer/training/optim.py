"""The optimiser of a run and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from trainer.config import OptimConfig
from trainer.methods.method import ParameterGroup


def make_optimizer(groups: Iterable[ParameterGroup], config: OptimConfig) -> torch.optim.Optimizer:
    """Adam over a method's parameters, each group with its multiple of the learning rate and its weight decay."""
    given = [
        {
            "params": group.parameters,
            "lr": config.lr * group.lr_scale,
            "lr_scale": group.lr_scale,
            "weight_decay": config.weight_decay if group.decay else 0.0,
        }
        for group in groups
    ]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(given, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(update: int, total: int, config: OptimConfig) -> float:
    """Learning rate of 0-based `update` of `total`: linear warm-up, then cosine annealing to the final ratio."""
    warmup = int(config.warmup * total)
    if update < warmup:
        return config.lr * (update + 1) / warmup
    progress = (update - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]

"""The optimiser of a run and its learning-rate schedule."""

from __future__ import annotations

import math

import torch

from trainer.config import OptimConfig
from trainer.methods.objective import Objective


def make_optimizer(objective: Objective, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam over student, GIM and proxies, each group with its multiple of the learning rate (`lr_scale`)."""
    scales = {"student": 1.0, "gim": config.gim_lr_scale, "drc": config.proxy_lr_scale}
    groups = []
    for part, scale in {**scales, "drc_student": config.proxy_lr_scale}.items():
        module = getattr(objective, part, None)
        if module is not None:
            groups.append({"params": list(module.parameters()), "lr": config.lr * scale, "lr_scale": scale})
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


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

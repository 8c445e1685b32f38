"""The optimiser of a run and its learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from trainer.config import OptimConfig
from trainer.methods.method import Method


def make_optimizer(method: Method, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam over a method's parameters, each with the multiples of the learning rate and the weight decay it has.

    The multiples are those of its group and, with `layer_decay`, of its layer in the student. What decays is what
    the group lets, without what timm spares (norms, biases) and what modules name in `no_weight_decay()`.
    """
    spared = _without_decay(method) if config.weight_decay else set()
    layers = _layer_scales(method.student.network, config.layer_decay)
    groups: dict[tuple[int, float, float], dict[str, Any]] = {}
    for number, group in enumerate(method.parameter_groups()):
        for parameter in group.parameters:
            if not parameter.requires_grad:
                continue
            scale = group.lr_scale * layers.get(id(parameter), 1.0)
            decay = config.weight_decay if group.decay and id(parameter) not in spared else 0.0
            same = {"params": [], "lr": config.lr * scale, "lr_scale": scale, "weight_decay": decay}
            groups.setdefault((number, scale, decay), same)["params"].append(parameter)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return kind(list(groups.values()), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _without_decay(method: nn.Module) -> set[int]:
    """The ids of parameters that weight decay would do harm to, by timm's rule and its modules' own word."""
    named = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in method.named_modules()
        for name in getattr(module, "no_weight_decay", tuple)()
    }
    groups = param_groups_weight_decay(method, weight_decay=1.0, no_weight_decay_list=named)
    return {id(parameter) for group in groups if not group["weight_decay"] for parameter in group["params"]}


def _layer_scales(network: nn.Module, layer_decay: float | None) -> dict[int, float]:
    """The multiple of the learning rate of each parameter by id: 1 in the last layer, `layer_decay` before it, …"""
    if layer_decay is None:
        return {}
    groups = param_groups_layer_decay(network, layer_decay=layer_decay)
    return {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}


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

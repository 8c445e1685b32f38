"""Settings of the baseline."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from trainer.config import Frozen, OptimConfig, TrainConfig


class BaselineLossConfig(Frozen):
    """L = L_DRC on the student's own embedding."""

    tau: float = Field(default=0.05, gt=0)


class BaselineOptimConfig(OptimConfig):
    """The learning rate of the proxies is a multiple of the student's."""

    proxy_lr_scale: float = Field(default=1.0, gt=0)


class BaselineConfig(TrainConfig):
    """A run of the student alone; no teacher's features are read."""

    presets: ClassVar = {"recommended": {"optim": {"proxy_lr_scale": 100.0}}}

    method: Literal["baseline"] = "baseline"
    loss: BaselineLossConfig = BaselineLossConfig()
    optim: BaselineOptimConfig = BaselineOptimConfig()

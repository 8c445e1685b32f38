"""Settings of plain regression."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from trainer.config import RegressionConfig
from trainer.methods.baseline.config import BaselineLossConfig, BaselineOptimConfig
from trainer.methods.teacher_config import FollowingConfig, TimestepsPerStep


class PlainRegressionConfig(RegressionConfig):
    """As in every method that has it, and on from the start."""

    weight: float = Field(default=2.0, gt=0)

    @model_validator(mode="after")
    def _of_something(self) -> PlainRegressionConfig:
        if not self.wanted:
            raise ValueError("tokens and pooled are both 0, so nothing is regressed: give one of them, e.g. tokens=1")
        return self


class RegressionOptimConfig(BaselineOptimConfig):
    """The learning rate of the heads that are thrown away is a multiple of the student's too."""

    head_lr_scale: float = Field(default=1.0, gt=0)


class RegressionRunConfig(FollowingConfig):
    """A run of the student with its own DRC that also regresses the cached features; no GIM."""

    presets: ClassVar = {
        "recommended": {
            "follow": "auto",
            "regression": {"pooled": 0.0},
            "optim": {"proxy_lr_scale": 100.0, "head_lr_scale": 30.0},
        }
    }

    method: Literal["regression"] = "regression"
    timesteps_per_step: TimestepsPerStep = Field(default=None, ge=1)
    loss: BaselineLossConfig = BaselineLossConfig()
    regression: PlainRegressionConfig = PlainRegressionConfig()
    optim: RegressionOptimConfig = RegressionOptimConfig()

"""Settings of plain regression."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from trainer.config import (
    ExtraRowsFrom,
    FeaturesFrom,
    Follow,
    RegressionConfig,
    ShuffleFeatures,
    TimestepsPerStep,
    TrainConfig,
)
from trainer.methods.baseline.config import BaselineLossConfig, BaselineOptimConfig


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


class RegressionRunConfig(TrainConfig):
    """A run of the student with its own DRC that also regresses the cached features; no GIM."""

    presets: ClassVar = {
        "recommended": {
            "follow": "auto",
            "regression": {"pooled": 0.0},
            "optim": {"proxy_lr_scale": 100.0, "head_lr_scale": 30.0},
        }
    }

    method: Literal["regression"] = "regression"
    unlabeled_per_batch: int = Field(default=0, ge=0)  # extra rows per batch that are regressed alone
    unlabeled_from: ExtraRowsFrom = "unlabeled"
    features: FeaturesFrom = None
    follow: Follow = "always"
    tap: str | None = None  # None: hidden where the cache has it, otherwise its first
    timesteps: tuple[int, ...] | None = None  # None: all that the cache has
    timesteps_per_step: TimestepsPerStep = Field(default=None, ge=1)
    shuffle_features: ShuffleFeatures = False
    loss: BaselineLossConfig = BaselineLossConfig()
    regression: PlainRegressionConfig = PlainRegressionConfig()
    optim: RegressionOptimConfig = RegressionOptimConfig()

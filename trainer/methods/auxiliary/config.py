"""Settings of the teacher as an auxiliary at test time."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from trainer.methods.baseline.config import BaselineLossConfig, BaselineOptimConfig
from trainer.methods.gcd.config import GimConfig
from trainer.methods.teacher_config import ReadingConfig, TimestepsPerStep


class AuxiliaryOptimConfig(BaselineOptimConfig):
    """The learning rate of the GIM is a multiple of the student's too."""

    gim_lr_scale: float = Field(default=1.0, gt=0)


class AuxiliaryConfig(ReadingConfig):
    """A run whose embedding is E_D: student and GIM learn to read the features together, and are used together."""

    presets: ClassVar = {
        "recommended": {
            "gim": {"width": 192, "queries": 8, "bridge_layers": 1, "residual": "pca"},
            "optim": {"gim_lr_scale": 10.0, "proxy_lr_scale": 100.0},
        }
    }

    method: Literal["auxiliary"] = "auxiliary"
    timesteps_per_step: TimestepsPerStep = Field(default=None, ge=1)
    gim: GimConfig = GimConfig()
    loss: BaselineLossConfig = BaselineLossConfig()
    optim: AuxiliaryOptimConfig = AuxiliaryOptimConfig()

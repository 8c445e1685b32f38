"""Settings of the baseline."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cache_schema.fields import Setting
from trainer.config import Frozen, OptimConfig, TrainConfig, UnlabelledFrom


class BaselineLossConfig(Frozen):
    """L = L_DRC on the student's own embedding."""

    tau: float = Field(default=0.05, gt=0)


class BaselineOptimConfig(OptimConfig):
    """The learning rate of the proxies is a multiple of the student's."""

    proxy_lr_scale: float = Field(default=1.0, gt=0)


class UnlabelledConfig(Frozen):
    """Unlabelled images without a teacher, for comparisons at equal data."""

    per_batch: Annotated[int, Setting("Extra rows per batch.")] = Field(default=0, ge=0)
    images_from: Annotated[
        UnlabelledFrom, Setting("Where they are from: the split, the training images in another view, or both.")
    ] = "unlabeled"
    by: Annotated[
        Literal["pseudo", "consistency"],
        Setting("pseudo: learn confident classes on changed images; consistency: the same embedding for both."),
    ] = "pseudo"
    threshold: Annotated[float, Setting("Least confidence of a pseudo-label.")] = Field(default=0.95, ge=0, le=1)
    weight: Annotated[float, Setting("Of their loss.")] = Field(default=1.0, ge=0)


class BaselineConfig(TrainConfig):
    """A run of the student alone; no teacher's features are read."""

    presets: ClassVar = {"recommended": {"optim": {"proxy_lr_scale": 100.0}}}

    method: Literal["baseline"] = "baseline"
    loss: BaselineLossConfig = BaselineLossConfig()
    unlabelled: UnlabelledConfig = UnlabelledConfig()
    optim: BaselineOptimConfig = BaselineOptimConfig()

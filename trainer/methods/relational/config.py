"""Settings of relational distillation."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cache_schema.fields import Setting
from trainer.methods.baseline.config import BaselineLossConfig, BaselineOptimConfig
from trainer.methods.teacher_config import FollowingConfig


class RelationalLossConfig(BaselineLossConfig):
    """L = drc_weight · L_DRC + weight · L_relational."""

    drc_weight: Annotated[float, Setting("Of DRC on E_R; 0 learns from the teacher alone.")] = Field(default=1.0, ge=0)
    # Of 0.1, 0.3 and 1 on held-out classes: more loses where the teacher tells images apart less well than the student.
    weight: Annotated[float, Setting("Of the similarities.")] = Field(default=0.1, gt=0)
    temperature: Annotated[float, Setting("Of the similarities.")] = Field(default=0.1, gt=0)
    components: Annotated[int, Setting("Half-whitened principal components of the pooled features.")] = Field(
        default=256, ge=1
    )


class RelationalConfig(FollowingConfig):
    """A run of the student with its own DRC that also learns which images the teacher finds alike; no GIM."""

    presets: ClassVar = {"recommended": {"follow": "auto", "optim": {"proxy_lr_scale": 100.0}}}

    method: Literal["relational"] = "relational"
    loss: RelationalLossConfig = RelationalLossConfig()
    optim: BaselineOptimConfig = BaselineOptimConfig()

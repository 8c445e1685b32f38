"""Settings of generative curriculum distillation, beside the method they configure."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from trainer.config import Frozen, OptimConfig, RegressionConfig, TrainConfig


class GimConfig(Frozen):
    """The generative injection module."""

    queries: int = Field(default=32, ge=1)  # k
    bridge_layers: int = Field(default=3, ge=0)  # n; 0 hands the teacher tokens to E_f as they are
    infuse_layers: int = Field(default=1, ge=1)  # m
    heads: int | None = Field(default=None, ge=1)  # None: one per 64 channels, or the next lower that divides
    ffn_ratio: float = Field(default=4.0, gt=0)
    position_embedding: bool = True
    timestep_embedding: bool = True
    token_norm: Literal["layer", "standardize"] = "layer"
    final_norm: bool = True  # LayerNorm on E_D, so that it lives on the scale of a ViT's own output
    mask_student: float = Field(default=0.0, ge=0, le=1)  # probability that E_f sees a mask token instead of E_R
    detach_student: bool = False  # True: E_f reads E_R but sends it no gradient


class LossConfig(Frozen):
    """L = L_DRC + alpha · L_CAL, and where each of the two acts."""

    tau: float = Field(default=0.05, gt=0)
    alpha: float = Field(default=1.0, ge=0)
    alpha_warmup: float = Field(default=0.0, ge=0, le=1)  # fraction of the run over which alpha grows from 0
    drc_on: Literal["ed", "both"] = "ed"
    drc_student_weight: float = Field(default=1.0, ge=0)  # of the E_R term of drc_on="both"
    share_proxies: bool = True  # drc_on="both": one set of proxies for E_D and E_R
    cal: Literal["raw", "normalized"] = "raw"
    cal_target: Literal["as_trained", "unmasked", "masked"] = "as_trained"
    stop_gradient: bool = False  # True: CAL moves the student only


class GcdOptimConfig(OptimConfig):
    """Learning rates of the parts are multiples of the student's."""

    gim_lr_scale: float = Field(default=1.0, gt=0)
    proxy_lr_scale: float = Field(default=1.0, gt=0)
    head_lr_scale: float = Field(default=1.0, gt=0)  # of the heads that are thrown away after training


_SMALL: dict[str, Any] = {
    "gim": {"mask_student": 0.5},
    "loss": {
        "alpha": 10.0,
        "alpha_warmup": 0.3,
        "drc_on": "both",
        "cal": "normalized",
        "cal_target": "masked",
        "stop_gradient": True,
    },
}


class GcdConfig(TrainConfig):
    """A run of DiT-Distill: the student learns from the cached features through the GIM."""

    presets: ClassVar = {
        "recommended": {**_SMALL, "optim": {"gim_lr_scale": 10.0, "proxy_lr_scale": 100.0}},
        "small": _SMALL,
        "demo": {**_SMALL, "unlabeled_per_batch": 32},
    }

    method: Literal["gcd"] = "gcd"
    unlabeled_per_batch: int = Field(default=0, ge=0)  # extra rows per batch that only CAL sees
    tap: str | None = None  # None: hidden where the cache has it, otherwise its first
    timesteps: tuple[int, ...] | None = None  # None: all that the cache has
    gim: GimConfig = GimConfig()
    loss: LossConfig = LossConfig()
    regression: RegressionConfig = RegressionConfig()
    optim: GcdOptimConfig = GcdOptimConfig()

"""Settings of generative curriculum distillation, beside the method they configure."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from cache_schema.fields import Setting
from trainer.config import Frozen, OptimConfig, RegressionConfig
from trainer.methods.teacher_config import FollowingConfig, TimestepsPerStep


class GimConfig(Frozen):
    """The generative injection module."""

    queries: int = Field(default=32, ge=1)  # k
    bridge_layers: int = Field(default=3, ge=0)  # n; 0 hands the teacher tokens to E_f as they are
    infuse_layers: int = Field(default=1, ge=1)  # m
    heads: int | None = Field(default=None, ge=1)  # None: one per 64 channels, or the next lower that divides
    ffn_ratio: float = Field(default=4.0, gt=0)
    position_embedding: bool = True
    timestep_embedding: bool = True
    width: Annotated[int | None, Setting("Channels inside the GIM; the student's by default.")] = Field(
        default=None, ge=1
    )
    residual: Annotated[
        Literal["none", "pca", "discriminant"],
        Setting(
            "What E_D starts as, with a gated GIM beside it that starts at 0. pca: the pooled tokens' principal "
            "components, trained on; discriminant: a linear head on them, of the training classes, that stays."
        ),
    ] = "none"
    token_norm: Annotated[
        Literal["layer", "standardize", "whiten"],
        Setting("Of teacher tokens: per token, per channel, or half-whitened principal components."),
    ] = "layer"
    token_components: Annotated[int, Setting("Principal components that token_norm=whiten keeps.")] = Field(
        default=256, ge=1
    )
    token_dropout: Annotated[float, Setting("Share of teacher tokens left out in training, at random.")] = Field(
        default=0.0, ge=0, lt=1
    )
    drop_path: Annotated[float, Setting("Chance that a branch of the GIM is left out in training.")] = Field(
        default=0.0, ge=0, lt=1
    )
    final_norm: bool = True  # LayerNorm on E_D, so that it lives on the scale of a ViT's own output
    mask_student: float = Field(default=0.0, ge=0, le=1)  # probability that E_f sees a mask token instead of E_R
    detach_student: bool = False  # True: E_f reads E_R but sends it no gradient

    @property
    def fits_all(self) -> bool:
        """Whether the features of every row are measured before the first update."""
        return self.residual != "none" or self.token_norm == "whiten"


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
    align: Annotated[
        Literal["direct", "projector", "relational", "memory"],
        Setting(
            "How E_R is held against its target: CAL itself, behind a throw-away projector, by similarities within the "
            "batch, or by similarities to a memory of targets (behind a projector)."
        ),
    ] = "direct"
    align_target: Annotated[
        Literal["ed", "pooled"], Setting("E_D, or the pooled teacher features' half-whitened principal components.")
    ] = "ed"
    target_components: Annotated[int, Setting("Components of align_target=pooled; direct: the student's width.")] = (
        Field(default=256, ge=1)
    )
    target_views: Annotated[
        Literal["own", "mean"], Setting("Target of the image's own view, or the mean over the cached views.")
    ] = "own"
    center: Annotated[
        Literal["none", "class"], Setting("class: align what is left when class means are taken off.")
    ] = "none"
    temperature: Annotated[float, Setting("Of similarities, in align relational and memory.")] = Field(
        default=0.1, gt=0
    )
    memory: Annotated[int, Setting("Targets that align=memory remembers.")] = Field(default=4096, ge=2)
    alpha_by: Annotated[
        Literal["constant", "gradient_ratio"],
        Setting("gradient_ratio: α is set so that the alignment's gradient at E_R is alpha_ratio times DRC's."),
    ] = "constant"
    alpha_ratio: Annotated[float, Setting("Of gradients, for alpha_by=gradient_ratio.")] = Field(default=1.0, ge=0)
    alpha_gate: Annotated[
        Literal["none", "validation"],
        Setting("validation: align only while masked E_D is ahead of E_R on validation classes."),
    ] = "none"


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
    # Without it the gain is that of some classes only: "Why gcd regresses as well" in benchmarks/README.md.
    "regression": {"weight": 2.0},
}

# Chosen on classes held out of the training split of Stanford Cars: see "Real photographs" in benchmarks/README.md.
# What gains is the regression of the teacher's map under crops; E_D and CAL beside it are kept from doing harm: the GIM
# reads E_R without moving it, and E_R follows E_D behind a projector.
_RECOMMENDED: dict[str, Any] = {
    "follow": "auto",
    "gim": {
        "width": 192,
        "queries": 8,
        "bridge_layers": 1,
        "residual": "pca",
        "mask_student": 0.5,
        "detach_student": True,
    },
    "loss": {
        "alpha": 0.5,
        "alpha_warmup": 0.3,
        "drc_on": "both",
        "share_proxies": False,
        "align": "projector",
        "cal": "normalized",
        "cal_target": "masked",
        "stop_gradient": True,
    },
    "regression": {"weight": 2.0, "pooled": 0.0},
    "optim": {"gim_lr_scale": 10.0, "proxy_lr_scale": 100.0, "head_lr_scale": 30.0},
}


class GcdConfig(FollowingConfig):
    """A run of DiT-Distill: the student learns from the cached features through the GIM."""

    presets: ClassVar = {
        "recommended": _RECOMMENDED,
        "small": _SMALL,
        "demo": {**_SMALL, "unlabeled_per_batch": 32},
    }

    method: Literal["gcd"] = "gcd"
    timesteps_per_step: TimestepsPerStep = Field(default=None, ge=1)
    gim: GimConfig = GimConfig()
    loss: LossConfig = LossConfig()
    regression: RegressionConfig = RegressionConfig()
    optim: GcdOptimConfig = GcdOptimConfig()

    @property
    def followed(self) -> frozenset[str]:
        return frozenset({"eval_every"} if self.loss.alpha_gate == "validation" else ())

"""DiT-Distill: the student with the GIM, DRC on the injected embedding, CAL between the two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.features import FeatureShape, Needs
from trainer.errors import TrainError
from trainer.methods.gcd.alignment import Alignment, gradient_alpha
from trainer.methods.gcd.cal import cal_ramp
from trainer.methods.gcd.config import GcdConfig
from trainer.methods.gcd.gim import GenerativeInjectionModule
from trainer.methods.gcd.gim_method import GimMethod
from trainer.methods.method import END, Moment, ParameterGroup
from trainer.methods.reading import TEACHER, TeacherFeatures, teacher_need
from trainer.models.alignment import require_others
from trainer.models.components import PrincipalComponents
from trainer.models.heads import ProxyClassifier
from trainer.models.regression import FeatureRegression
from trainer.models.student import Student

OTHER_VIEW = "other_view"  # the name of the same features in the other view of an image


class Gcd(GimMethod):
    """L = L_DRC + α · L_CAL; DRC acts on E_D, or on E_D and E_R (`loss.drc_on`)."""

    loss_figures = {  # noqa: RUF012
        "DRC (task loss)": {"drc_student": "on E_R", "drc": "on E_D"},
        "CAL (alignment of E_R with E_D)": {"cal": ""},
        "Regression of the teacher's features": {"regression": ""},
    }
    auxiliary_names = {"unmasked": "E_D, E_R unmasked", "masked": "E_D, E_R masked"}  # noqa: RUF012
    made_of_teacher = "masked"
    advice = "lower --lr or --alpha, set optim.grad_clip=1, or use loss.cal=normalized"

    def __init__(self, config: GcdConfig, student: Student, classes: int, shapes: Mapping[str, FeatureShape]):
        super().__init__(config, student, classes, shapes)
        _check(config)
        self.config = config
        self.needed = Needs({TEACHER: self.needed.features[TEACHER]})  # at test time, an image is seen one way round
        shape, loss = shapes[TEACHER], config.loss
        direct = loss.align == "direct"
        width = student.dim if direct else config.gim.width or student.dim  # of E_D
        torch.manual_seed(config.seed + 1)
        self.gim = GenerativeInjectionModule(
            shape.tokens, shape.channels, student.dim, len(shape.timesteps), config.gim, width
        )
        torch.manual_seed(config.seed + 2)  # as in every method: one seed, the same proxies
        self.drc = ProxyClassifier(classes, width, loss.tau)
        separate = loss.drc_on == "both" and not loss.share_proxies
        self.drc_student = ProxyClassifier(classes, student.dim, loss.tau) if separate else None
        if loss.drc_on == "both" and width != student.dim and not separate:
            raise TrainError(
                f"gim.width: E_D has {width} channels and E_R {student.dim}, which cannot share proxies; "
                "add loss.share_proxies=false"
            )
        torch.manual_seed(config.seed + 3)
        self.regression = FeatureRegression(config.regression, student, shape) if config.regression.wanted else None
        torch.manual_seed(config.seed + 4)
        timesteps, pooled = len(shape.timesteps), loss.align_target == "pooled"
        components = student.dim if direct else loss.target_components
        self.pooled = PrincipalComponents(timesteps, shape.channels, components) if pooled else None
        self.alignment = Alignment(loss, classes, timesteps, student.dim, components if pooled else width)
        self.gate: Tensor | None
        self.register_buffer("gate", torch.zeros(()) if loss.alpha_gate == "validation" else None)
        self.waits_for_scores = None if self.gate is None else "loss.alpha_gate"

    @classmethod
    def needs(cls, config: GcdConfig) -> Needs:
        features = teacher_need(config)
        if config.loss.target_views == "mean":
            features[OTHER_VIEW] = replace(features[TEACHER], next_view=True)
        gim, loss = config.gim, config.loss
        whole = gim.fits_all or loss.align_target == "pooled"
        return Needs(
            features,
            unlabelled=config.unlabeled_per_batch,
            unlabelled_from=config.unlabeled_from,
            fit_on="all" if whole else "few",
            places=config.regression.wanted,
            exact=whole or gim.token_norm == "standardize" or config.regression.wanted,
            timesteps_per_step=config.timesteps_per_step,
        )

    def forward(self, batch: Batch, moment: Moment = END) -> dict[str, Tensor]:
        config, gim = self.config.loss, self.gim
        tokens, drawn = batch.features[TEACHER], batch.timesteps  # (B, P, L, C_t)
        if self.regression is None:
            student, places = self.student(batch.images), None  # E_R (B, C)
        else:
            student, places = self.student.with_tokens(batch.images)
        bridged, shortcut = gim.bridge(tokens, drawn), gim.shortcut_of(tokens, drawn)  # Q̂_t (B, P, k, C)
        masked = gim.draw_mask(bridged)
        injected = gim.infuse(student, bridged, masked, shortcut)  # E_D (B, P, C)
        target = self._target(batch, student, bridged, shortcut, injected, masked)

        losses = {"drc": self.drc(injected, batch.labels), "cal": self.alignment(student, target, batch.labels)}
        total = losses["drc"]
        if config.drc_on == "both":
            losses["drc_student"] = (self.drc_student or self.drc)(student, batch.labels)
        alpha = self._alpha(losses, student, moment)
        total = total + alpha * losses["cal"]
        if config.drc_on == "both":
            total = total + config.drc_student_weight * losses["drc_student"]
        if self.regression is not None and places is not None:
            losses["regression"] = self.regression(student, places, tokens, batch.boxes, drawn)
            total = total + self.config.regression.weight * losses["regression"]
        if isinstance(alpha, Tensor):
            losses["alpha"] = alpha
        return {"loss": total, **losses}

    def _alpha(self, losses: dict[str, Tensor], student: Tensor, moment: Moment) -> float | Tensor:
        """α at this moment; a tensor where it is not known beforehand."""
        config = self.config.loss
        alpha: float | Tensor = cal_ramp(moment.update, moment.total, config.alpha_warmup) * config.alpha
        if config.alpha_by == "gradient_ratio" and student.requires_grad:
            task = config.drc_student_weight * losses["drc_student"]
            ramp = cal_ramp(moment.update, moment.total, config.alpha_warmup)
            alpha = ramp * gradient_alpha(task, losses["cal"], student, config.alpha_ratio)
        return alpha if self.gate is None else alpha * self.gate

    def _target(
        self,
        batch: Batch,
        student: Tensor,
        bridged: Tensor,
        shortcut: Tensor | None,
        injected: Tensor,
        masked: bool | Tensor,
    ) -> Tensor:
        """What E_R is drawn to, (B, P, D): of the image's own view, or the mean over it and the other one."""
        other, drawn = batch.features.get(OTHER_VIEW), batch.timesteps
        if self.pooled is not None:
            views = [batch.features[TEACHER], *([] if other is None else [other])]
            pooled = [view.mean(2, keepdim=True, dtype=torch.float32) for view in views]
            return _mean_direction([self.pooled(view, drawn).squeeze(2) for view in pooled])
        own = self._cal_target(student, bridged, shortcut, injected, masked)
        if other is None:
            return own
        asked = self.config.loss.cal_target
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.loss.stop_gradient):
            mask = masked if asked == "as_trained" else asked == "masked"
            bridged, shortcut = self.gim.bridge(other, drawn), self.gim.shortcut_of(other, drawn)
            mirrored = self.gim.infuse(student, bridged, mask, shortcut)
        return _mean_direction([own, mirrored])

    def _cal_target(
        self, student: Tensor, bridged: Tensor, shortcut: Tensor | None, injected: Tensor, masked: bool | Tensor
    ) -> Tensor:
        """The E_D that E_R is drawn to; another mask costs only E_f once more, for E_b never sees E_R."""
        config = self.config.loss
        if config.cal_target == "as_trained":
            return injected
        wanted = config.cal_target == "masked"
        if masked is wanted:
            return injected
        with torch.set_grad_enabled(torch.is_grad_enabled() and not config.stop_gradient):
            return self.gim.infuse(student, bridged, wanted, shortcut)

    def parameter_groups(self) -> list[ParameterGroup]:
        optim = self.config.optim
        parts = [(self.student, 1.0), (self.gim, optim.gim_lr_scale), (self.drc, optim.proxy_lr_scale)]
        if self.drc_student is not None:
            parts.append((self.drc_student, optim.proxy_lr_scale))
        if self.alignment.projector is not None:
            parts.append((self.alignment.projector, optim.gim_lr_scale))
        if self.regression is not None:
            parts.append((self.regression, optim.head_lr_scale))
        return [ParameterGroup(list(module.parameters()), scale) for module, scale in parts]

    def fit(self, batches: Iterable[Batch]) -> None:
        features = TeacherFeatures(batches)
        self.gim.fit(features, ((batch.features[TEACHER], batch.labels) for batch in batches))
        if self.pooled is not None:
            self.pooled.fit(tokens.float().mean(2, keepdim=True) for tokens in features)
        if self.regression is not None:
            self.regression.fit(features)

    def validated(self, scores: Mapping[str, Any]) -> None:
        """Open the gate of α while masked E_D is ahead of E_R in R@1, and close it while it is not.

        Source: a teacher is followed only as long as that helps, as in the early-stopped distillation of Cho &
        Hariharan, "On the Efficacy of Knowledge Distillation", ICCV 2019.
        """
        if self.gate is None:
            return
        if not scores["auxiliary"]:
            raise TrainError("loss.alpha_gate: the cache has no features of the validation classes to score E_D with")
        ahead = scores["auxiliary"]["masked"]["mean"]["recall_at_1"] > scores["student"]["recall_at_1"]
        self.gate.fill_(float(ahead))

    def auxiliary(self, student: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens = features[TEACHER]
        bridged, shortcut = self.gim.bridge(tokens), self.gim.shortcut_of(tokens)
        return {name: self.gim.infuse(student, bridged, name == "masked", shortcut) for name in self.auxiliary_names}


def _mean_direction(views: list[Tensor]) -> Tensor:
    """The mean of unit embeddings (B, P, D); one alone is left as it is."""
    if len(views) == 1:
        return views[0]
    return torch.stack([F.normalize(view.float(), dim=-1) for view in views]).mean(0)


def _check(config: GcdConfig) -> None:
    """Raise TrainError for settings that do not go together."""
    loss = config.loss
    if config.timesteps_per_step is not None:
        held = f"loss.align={loss.align}" if loss.align in ("relational", "memory") else "loss.center=class"
        if loss.align in ("relational", "memory") or loss.center == "class":
            raise TrainError(
                f"timesteps_per_step: {held} holds images against each other at the same timestep; leave one of the "
                "two out"
            )
    if loss.align == "relational":
        require_others(config.at_once + config.unlabeled_per_batch // config.optim.accumulate, "loss.align=relational")
    if loss.alpha_by == "gradient_ratio" and (loss.drc_on != "both" or not loss.drc_student_weight):
        raise TrainError(
            "loss.alpha_by: gradient_ratio needs DRC on E_R to be held against; add loss.drc_on=both, with a "
            "loss.drc_student_weight"
        )
    if loss.alpha_gate == "validation" and not (config.validation_classes and config.eval_every):
        raise TrainError(
            "loss.alpha_gate: validation needs classes held out and scored on the way; "
            "add --validation-classes 0.2 --eval-every 1"
        )
    if loss.alpha_gate == "validation" and loss.align_target == "pooled":
        raise TrainError("loss.alpha_gate: validation compares E_D with E_R; use it with loss.align_target=ed")

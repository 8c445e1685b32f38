"""The teacher as an auxiliary: what is trained and what is scored is E_D, which reads an image's cached features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.features import FeatureShape, Needs
from trainer.methods.auxiliary.config import AuxiliaryConfig
from trainer.methods.gcd.gim import GenerativeInjectionModule
from trainer.methods.gcd.gim_method import GimMethod
from trainer.methods.method import END, Moment, ParameterGroup
from trainer.methods.reading import TEACHER, TeacherFeatures, teacher_need
from trainer.models.heads import ProxyClassifier
from trainer.models.student import Student


class Auxiliary(GimMethod):
    """L = L_DRC(E_D), with nothing that draws E_R to it: at test time E_D is made of pixels and features again.

    Source: DiT-Distill, CVPR 2026, rows ② (the teacher as it was published) and ③ (refined) of the ablation: which of
    the two it is depends on the cache.
    """

    loss_figures = {"DRC (task loss)": {"drc": "on E_D"}}  # noqa: RUF012
    auxiliary_names = {"unmasked": "E_D, the teacher's features read at test time"}  # noqa: RUF012
    made_of_teacher = "unmasked"
    scored = "unmasked"

    def __init__(self, config: AuxiliaryConfig, student: Student, classes: int, shapes: Mapping[str, FeatureShape]):
        super().__init__(config, student, classes, shapes)
        self.config = config
        shape = shapes[TEACHER]
        torch.manual_seed(config.seed + 1)  # as in gcd: one seed, the same GIM
        self.gim = GenerativeInjectionModule(
            shape.tokens, shape.channels, student.dim, len(shape.timesteps), config.gim, student.dim
        )
        torch.manual_seed(config.seed + 2)  # as in every method: one seed, the same proxies
        self.drc = ProxyClassifier(classes, student.dim, config.loss.tau)

    @classmethod
    def needs(cls, config: AuxiliaryConfig) -> Needs:
        whole = config.gim.fits_all
        return Needs(
            teacher_need(config),
            fit_on="all" if whole else "few",
            exact=whole or config.gim.token_norm == "standardize",
            timesteps_per_step=config.timesteps_per_step,
        )

    def forward(self, batch: Batch, moment: Moment = END) -> dict[str, Tensor]:
        tokens, drawn = batch.features[TEACHER], batch.timesteps  # (B, P, L, C_t)
        student = self.student(batch.images)  # E_R (B, C)
        bridged = self.gim.bridge(tokens, drawn)  # Q̂_t (B, P, k, C)
        injected = self.gim.infuse(student, bridged, self.gim.draw_mask(bridged), self.gim.shortcut_of(tokens, drawn))
        drc = self.drc(injected, batch.labels)
        return {"loss": drc, "drc": drc}

    def parameter_groups(self) -> list[ParameterGroup]:
        optim = self.config.optim
        return [
            ParameterGroup(list(self.student.parameters())),
            ParameterGroup(list(self.gim.parameters()), optim.gim_lr_scale),
            ParameterGroup(list(self.drc.parameters()), optim.proxy_lr_scale),
        ]

    def fit(self, batches: Iterable[Batch]) -> None:
        self.gim.fit(TeacherFeatures(batches), ((batch.features[TEACHER], batch.labels) for batch in batches))

    def auxiliary(self, student: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens = features[TEACHER]
        injected = self.gim.infuse(student, self.gim.bridge(tokens), False, self.gim.shortcut_of(tokens))
        return {"unmasked": injected}

"""Relational distillation: DRC on the student's own embedding, and the similarities of the teacher's features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.features import FeatureShape, Needs
from trainer.methods.method import END, Method, Moment, ParameterGroup
from trainer.methods.reading import TEACHER, teacher_need
from trainer.methods.relational.config import RelationalConfig
from trainer.models.alignment import relational_loss, require_others
from trainer.models.components import PrincipalComponents
from trainer.models.heads import ProxyClassifier
from trainer.models.student import Student


class Relational(Method):
    """L = drc_weight · L_DRC(E_R) + weight · L_relational(E_R, pooled teacher features).

    The features are pooled over their tokens and half-whitened: as they are, a few channels decide every cosine.
    """

    loss_figures = {  # noqa: RUF012
        "DRC (task loss)": {"drc_student": "on E_R"},
        "Similarities of the teacher's features": {"relational": ""},
    }
    advice = "lower --lr or loss.weight, or set optim.grad_clip=1"

    def __init__(self, config: RelationalConfig, student: Student, classes: int, shapes: Mapping[str, FeatureShape]):
        super().__init__(config, student, classes, shapes)
        require_others(config.at_once + config.unlabeled_per_batch // config.optim.accumulate, "method relational")
        self.config = config
        torch.manual_seed(config.seed + 2)  # as in every method: one seed, the same proxies
        self.drc = ProxyClassifier(classes, student.dim, config.loss.tau)
        shape = shapes[TEACHER]
        self.components = PrincipalComponents(len(shape.timesteps), shape.channels, config.loss.components)

    @classmethod
    def needs(cls, config: RelationalConfig) -> Needs:
        return Needs(
            teacher_need(config),
            unlabelled=config.unlabeled_per_batch,
            unlabelled_from=config.unlabeled_from,
            exact=True,
            fit_on="all",
        )

    def forward(self, batch: Batch, moment: Moment = END) -> dict[str, Tensor]:
        loss = self.config.loss
        student = self.student(batch.images)  # E_R (B, C)
        target = self.pooled(batch.features[TEACHER])  # (B, P, K)
        drc = self.drc(student, batch.labels)
        relational = relational_loss(student, target, loss.temperature)
        total = loss.drc_weight * drc + loss.weight * relational
        return {"loss": total, "drc_student": drc, "relational": relational}

    def pooled(self, tokens: Tensor) -> Tensor:
        """(B, P, L, C_t) -> (B, P, K)."""
        return self.components(tokens.float().mean(2, keepdim=True)).squeeze(2)

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.student.parameters())),
            ParameterGroup(list(self.drc.parameters()), self.config.optim.proxy_lr_scale),
        ]

    def fit(self, batches: Iterable[Batch]) -> None:
        self.components.fit(batch.features[TEACHER].float().mean(2, keepdim=True) for batch in batches)

"""Plain regression: the student with DRC on its own embedding, and the teacher's features as targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.features import FeatureShape, Needs
from trainer.methods.method import END, Method, Moment, ParameterGroup
from trainer.methods.reading import TEACHER, teacher_need
from trainer.methods.regression.config import RegressionRunConfig
from trainer.models.heads import ProxyClassifier
from trainer.models.regression import FeatureRegression
from trainer.models.student import Student


class Regression(Method):
    """L = L_DRC(E_R) + weight · L_regression."""

    loss_figures = {  # noqa: RUF012
        "DRC (task loss)": {"drc_student": "on E_R"},
        "Regression of the teacher's features": {"regression": ""},
    }
    advice = "lower --lr or regression.weight, or set optim.grad_clip=1"

    def __init__(self, config: RegressionRunConfig, student: Student, classes: int, shapes: Mapping[str, FeatureShape]):
        super().__init__(config, student, classes, shapes)
        self.config = config
        torch.manual_seed(config.seed + 2)  # as in every method: one seed, the same proxies
        self.drc = ProxyClassifier(classes, student.dim, config.loss.tau)
        torch.manual_seed(config.seed + 3)
        self.regression = FeatureRegression(config.regression, student, shapes[TEACHER])

    @classmethod
    def needs(cls, config: RegressionRunConfig) -> Needs:
        return Needs(
            teacher_need(config),
            unlabelled=config.unlabeled_per_batch,
            unlabelled_from=config.unlabeled_from,
            places=True,
            exact=True,
            timesteps_per_step=config.timesteps_per_step,
        )

    def forward(self, batch: Batch, moment: Moment = END) -> dict[str, Tensor]:
        embedding, tokens = self.student.with_tokens(batch.images)
        drc = self.drc(embedding, batch.labels)
        regression = self.regression(embedding, tokens, batch.features[TEACHER], batch.boxes, batch.timesteps)
        return {"loss": drc + self.config.regression.weight * regression, "drc_student": drc, "regression": regression}

    def parameter_groups(self) -> list[ParameterGroup]:
        optim = self.config.optim
        return [
            ParameterGroup(list(self.student.parameters())),
            ParameterGroup(list(self.drc.parameters()), optim.proxy_lr_scale),
            ParameterGroup(list(self.regression.parameters()), optim.head_lr_scale),
        ]

    def fit(self, batches: Iterable[Batch]) -> None:
        self.regression.fit(batch.features[TEACHER] for batch in batches)

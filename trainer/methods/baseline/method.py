"""The baseline: the student with DRC on its own embedding, and no teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.data.batches import Batch
from trainer.data.features import FeatureShape
from trainer.methods.baseline.config import BaselineConfig
from trainer.methods.method import END, Method, Moment, ParameterGroup
from trainer.models.heads import ProxyClassifier
from trainer.models.student import Student


class Baseline(Method):
    """L = L_DRC(E_R)."""

    loss_figures = {"DRC (task loss)": {"drc_student": "on E_R"}}  # noqa: RUF012

    def __init__(self, config: BaselineConfig, student: Student, classes: int, shapes: Mapping[str, FeatureShape]):
        super().__init__(config, student, classes, shapes)
        self.config = config
        torch.manual_seed(config.seed + 2)  # as in every method: one seed, the same proxies
        self.drc = ProxyClassifier(classes, student.dim, config.loss.tau)

    def forward(self, batch: Batch, moment: Moment = END) -> dict[str, Tensor]:
        drc = self.drc(self.student(batch.images), batch.labels)
        return {"loss": drc, "drc_student": drc}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.student.parameters())),
            ParameterGroup(list(self.drc.parameters()), self.config.optim.proxy_lr_scale),
        ]

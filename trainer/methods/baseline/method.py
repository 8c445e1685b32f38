"""The baseline: the student with DRC on its own embedding, and no teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.features import FeatureShape, Needs
from trainer.methods.baseline.config import BaselineConfig
from trainer.methods.baseline.unlabelled import consistency_loss, pseudo_label_loss, strongly_changed
from trainer.methods.method import END, Method, Moment, ParameterGroup
from trainer.models.heads import ProxyClassifier
from trainer.models.student import Student


class Baseline(Method):
    """L = L_DRC(E_R), and where asked a loss of unlabelled images."""

    loss_figures = {  # noqa: RUF012
        "DRC (task loss)": {"drc_student": "on E_R"},
        "Unlabelled images": {"unlabelled": ""},
    }

    def __init__(self, config: BaselineConfig, student: Student, classes: int, shapes: Mapping[str, FeatureShape]):
        super().__init__(config, student, classes, shapes)
        self.config = config
        torch.manual_seed(config.seed + 2)  # as in every method: one seed, the same proxies
        self.drc = ProxyClassifier(classes, student.dim, config.loss.tau)

    @classmethod
    def needs(cls, config: BaselineConfig) -> Needs:
        return Needs(
            unlabelled=config.unlabelled.per_batch,
            unlabelled_from=config.unlabelled.images_from,
            unlabelled_settings=("unlabelled.per_batch", "unlabelled.images_from"),
        )

    def forward(self, batch: Batch, moment: Moment = END) -> dict[str, Tensor]:
        student, config = self.student(batch.images), self.config.unlabelled
        drc = self.drc(student, batch.labels)
        if not batch.unlabelled:
            return {"loss": drc, "drc_student": drc}
        weak = student[-batch.unlabelled :]
        strong = self.student(strongly_changed(batch.images[-batch.unlabelled :]))
        if config.by == "pseudo":
            loss = pseudo_label_loss(weak, strong, self.drc.proxies, self.config.loss.tau, config.threshold)
        else:
            loss = consistency_loss(weak, strong)
        return {"loss": drc + config.weight * loss, "drc_student": drc, "unlabelled": loss}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(list(self.student.parameters())),
            ParameterGroup(list(self.drc.parameters()), self.config.optim.proxy_lr_scale),
        ]

"""DiT-Distill: the student with the GIM, DRC on the injected embedding, CAL between the two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.data.batches import Batch
from trainer.data.features import FeatureNeed, FeatureShape, Needs
from trainer.errors import TrainError
from trainer.methods.gcd.cal import cal_loss, cal_ramp
from trainer.methods.gcd.config import GcdConfig
from trainer.methods.gcd.gim import GenerativeInjectionModule
from trainer.methods.method import END, Method, Moment, ParameterGroup
from trainer.models.heads import ProxyClassifier
from trainer.models.regression import FeatureRegression
from trainer.models.student import Student
from trainer.models.weights import load_weights, save_weights

TEACHER = "teacher"  # the name of the features it reads
GIM_FILE = "gim.safetensors"


class Gcd(Method):
    """L = L_DRC + α · L_CAL; DRC acts on E_D, or on E_D and E_R (`loss.drc_on`)."""

    loss_figures = {  # noqa: RUF012
        "DRC (task loss)": {"drc_student": "on E_R", "drc": "on E_D"},
        "CAL (alignment of E_R with E_D)": {"cal": ""},
        "Regression of the teacher's features": {"regression": ""},
    }
    auxiliary_names = {"unmasked": "E_D, E_R unmasked", "masked": "E_D, E_R masked"}  # noqa: RUF012
    files = (GIM_FILE,)
    advice = "lower --lr or --alpha, set optim.grad_clip=1, or use loss.cal=normalized"

    def __init__(self, config: GcdConfig, student: Student, classes: int, shapes: Mapping[str, FeatureShape]):
        super().__init__(config, student, classes, shapes)
        self.config = config
        shape, loss = shapes[TEACHER], config.loss
        torch.manual_seed(config.seed + 1)
        self.gim = GenerativeInjectionModule(
            shape.tokens, shape.channels, student.dim, len(shape.timesteps), config.gim
        )
        torch.manual_seed(config.seed + 2)  # as in every method: one seed, the same proxies
        self.drc = ProxyClassifier(classes, student.dim, loss.tau)
        separate = loss.drc_on == "both" and not loss.share_proxies
        self.drc_student = ProxyClassifier(classes, student.dim, loss.tau) if separate else None
        torch.manual_seed(config.seed + 3)
        self.regression = FeatureRegression(config.regression, student, shape) if config.regression.wanted else None

    @classmethod
    def needs(cls, config: GcdConfig) -> Needs:
        features = {TEACHER: FeatureNeed(config.tap, config.timesteps)}
        return Needs(features, unlabelled=config.unlabeled_per_batch)

    def forward(self, batch: Batch, moment: Moment = END) -> dict[str, Tensor]:
        config, gim = self.config.loss, self.gim
        if self.regression is None:
            student, tokens = self.student(batch.images), None  # E_R (B, C)
        else:
            student, tokens = self.student.with_tokens(batch.images)
        bridged = gim.bridge(batch.features[TEACHER])  # Q̂_t (B, P, k, C)
        masked = gim.draw_mask(bridged)
        injected = gim.infuse(student, bridged, masked)  # E_D (B, P, C)
        target = self._cal_target(student, bridged, injected, masked)

        losses = {
            "drc": self.drc(injected, batch.labels),
            "cal": cal_loss(student, target, config.cal, config.stop_gradient),
        }
        ramp = cal_ramp(moment.update, moment.total, config.alpha_warmup)
        total = losses["drc"] + ramp * config.alpha * losses["cal"]
        if config.drc_on == "both":
            losses["drc_student"] = (self.drc_student or self.drc)(student, batch.labels)
            total = total + config.drc_student_weight * losses["drc_student"]
        if self.regression is not None and tokens is not None:
            losses["regression"] = self.regression(student, tokens, batch.features[TEACHER], batch.boxes)
            total = total + self.config.regression.weight * losses["regression"]
        return {"loss": total, **losses}

    def _cal_target(self, student: Tensor, bridged: Tensor, injected: Tensor, masked: bool | Tensor) -> Tensor:
        """The E_D that E_R is drawn to; another mask costs only E_f once more, for E_b never sees E_R."""
        config = self.config.loss
        if config.cal_target == "as_trained":
            return injected
        wanted = config.cal_target == "masked"
        if masked is wanted:
            return injected
        with torch.set_grad_enabled(torch.is_grad_enabled() and not config.stop_gradient):
            return self.gim.infuse(student, bridged, masked=wanted)

    def parameter_groups(self) -> list[ParameterGroup]:
        optim = self.config.optim
        parts = [(self.student, 1.0), (self.gim, optim.gim_lr_scale), (self.drc, optim.proxy_lr_scale)]
        if self.drc_student is not None:
            parts.append((self.drc_student, optim.proxy_lr_scale))
        if self.regression is not None:
            parts.append((self.regression, optim.head_lr_scale))
        return [ParameterGroup(list(module.parameters()), scale) for module, scale in parts]

    def fit(self, batches: Iterable[Batch]) -> None:
        features = [batch.features[TEACHER] for batch in batches] if self.regression is not None else None
        self.gim.tokens.fit(features if features is not None else (batch.features[TEACHER] for batch in batches))
        if self.regression is not None and features is not None:
            self.regression.fit(features)

    def auxiliary(self, student: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bridged = self.gim.bridge(features[TEACHER])
        return {name: self.gim.infuse(student, bridged, masked=name == "masked") for name in self.auxiliary_names}

    def save(self, run: Path) -> None:
        save_weights(self.gim.state_dict(), run / GIM_FILE)

    def load(self, run: Path) -> None:
        weights = load_weights(run / GIM_FILE)
        try:
            self.gim.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise TrainError(
                f"the GIM of {run} does not fit tap {self.config.tap or 'of the run'} of this cache: {reason}"
            ) from error

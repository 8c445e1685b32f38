"""What a run minimises: the student with DRC alone (baseline), or with the GIM, DRC and CAL (distill)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.config import TrainConfig
from trainer.data.batches import Batch
from trainer.methods.gim import GenerativeInjectionModule
from trainer.models.heads import ProxyClassifier, cal_loss
from trainer.models.student import Student


class Objective(nn.Module):
    """The student and the class proxies; `forward` gives the losses of one batch, `loss` is the one to minimise."""

    def __init__(self, student: Student, classes: int, config: TrainConfig):
        super().__init__()
        self.config = config.loss
        self.student = student
        self.gim: GenerativeInjectionModule | None = None
        self.drc = ProxyClassifier(classes, student.dim, config.loss.tau)

    def forward(self, batch: Batch, ramp: float = 1.0) -> dict[str, Tensor]:
        drc = self.drc(self.student(batch.images), batch.labels)
        return {"loss": drc, "drc_student": drc}


class DistillObjective(Objective):
    """L = L_DRC + α · L_CAL; DRC acts on E_D, or on E_D and E_R (`loss.drc_on`)."""

    def __init__(self, student: Student, gim: GenerativeInjectionModule, classes: int, config: TrainConfig):
        super().__init__(student, classes, config)
        self.gim = gim
        separate = config.loss.drc_on == "both" and not config.loss.share_proxies
        self.drc_student = ProxyClassifier(classes, student.dim, config.loss.tau) if separate else None

    def forward(self, batch: Batch, ramp: float = 1.0) -> dict[str, Tensor]:
        """`ramp`, 0 to 1, scales α: see `cal_ramp`."""
        config, gim, tokens = self.config, self.gim, batch.tokens
        assert gim is not None
        assert tokens is not None, "distill mode reads the features of every row"
        student = self.student(batch.images)  # E_R (B, C)
        bridged = gim.bridge(tokens)  # Q̂_t (B, P, k, C)
        masked = gim.draw_mask(bridged)
        injected = gim.infuse(student, bridged, masked)  # E_D (B, P, C)
        target = self._cal_target(gim, student, bridged, injected, masked)

        losses = {
            "drc": self.drc(injected, batch.labels),
            "cal": cal_loss(student, target, config.cal, config.stop_gradient),
        }
        total = losses["drc"] + ramp * config.alpha * losses["cal"]
        if config.drc_on == "both":
            losses["drc_student"] = (self.drc_student or self.drc)(student, batch.labels)
            total = total + config.drc_student_weight * losses["drc_student"]
        return {"loss": total, **losses}

    def _cal_target(
        self,
        gim: GenerativeInjectionModule,
        student: Tensor,
        bridged: Tensor,
        injected: Tensor,
        masked: bool | Tensor,
    ) -> Tensor:
        """The E_D that E_R is drawn to; another mask costs only E_f once more, for E_b never sees E_R."""
        if self.config.cal_target == "as_trained":
            return injected
        wanted = self.config.cal_target == "masked"
        if masked is wanted:
            return injected
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.stop_gradient):
            return gim.infuse(student, bridged, masked=wanted)


def build_objective(
    config: TrainConfig, student: Student, classes: int, token_shape: tuple[int, int, int]
) -> Objective:
    """Put GIM and proxies around `student`; `token_shape` is (P, L, C_t).

    Each part has its own seed: a baseline and a distilled run of one seed start from the same proxies.
    """
    gim = None
    if config.mode == "distill":
        torch.manual_seed(config.seed + 1)
        timesteps, tokens, channels = token_shape
        gim = GenerativeInjectionModule(tokens, channels, student.dim, timesteps, config.gim)
    torch.manual_seed(config.seed + 2)
    return Objective(student, classes, config) if gim is None else DistillObjective(student, gim, classes, config)

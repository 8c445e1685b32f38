"""What draws the student's embedding to the target that the teacher makes: CAL, and what may take its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer import processes
from trainer.methods.gcd.cal import cal_loss
from trainer.methods.gcd.config import LossConfig
from trainer.models.alignment import ClassMeans, Memory, memory_loss, projector, relational_loss

LARGEST_ALPHA = 1e4  # of `gradient_alpha`: where the alignment has no gradient, no α would give it one


class Alignment(nn.Module):
    """The alignment loss of a config, with what it trains or remembers; none of it is kept with the student.

    `direct`: CAL. `projector`: CAL behind a throw-away MLP. `relational`: similarities within the batch. `memory`:
    similarities to a memory of targets, behind a throw-away MLP. `center="class"` compares what is left of both when
    the means of their classes are taken off. Sources: at each part in `trainer.models.alignment`.
    """

    def __init__(self, config: LossConfig, classes: int, timesteps: int, student_dim: int, target_dim: int):
        super().__init__()
        self.config = config
        projects = config.align in ("projector", "memory")
        self.projector = projector(student_dim, target_dim) if projects else None
        self.memory = Memory(config.memory, timesteps, target_dim) if config.align == "memory" else None
        centred = config.center == "class"
        self.student_means = ClassMeans(classes, 1, target_dim if projects else student_dim) if centred else None
        self.target_means = ClassMeans(classes, timesteps, target_dim) if centred else None

    def forward(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """E_R (B, C), target (B, P, D), labels (B,) with -1 for unlabelled rows: a scalar."""
        config = self.config
        if self.projector is not None:
            student = self.projector(student)
        if config.stop_gradient:
            target = target.detach()
        student, target = self._centred(student, target, labels)
        if config.align == "relational":
            return relational_loss(student, target, config.temperature)
        if self.memory is not None:
            if self.training:
                self.memory.add(target)  # a copy: what is remembered is used below, and not written to again
            return memory_loss(student, target, self.memory.values, self.memory.filled, config.temperature)
        return cal_loss(student, target, config.cal)

    def _centred(self, student: Tensor, target: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.student_means is None or self.target_means is None:
            return student, target
        student = student.unsqueeze(1)  # (B, 1, C)
        if self.training:
            self.student_means.update(student, labels)
            self.target_means.update(target, labels)
        return self.student_means.remove(student, labels).squeeze(1), self.target_means.remove(target, labels)


def gradient_alpha(task: Tensor, alignment: Tensor, student: Tensor, ratio: float) -> Tensor:
    """The α at which the alignment's gradient at E_R (B, C) is `ratio` times as long as the task's: a scalar.

    Source: the adaptive weight of Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021.
    """
    (of_task,) = torch.autograd.grad(task, student, retain_graph=True)
    (of_alignment,) = torch.autograd.grad(alignment, student, retain_graph=True)
    length = _length(of_alignment).clamp_min(torch.finfo(torch.float32).tiny)
    return (ratio * _length(of_task) / length).clamp(max=LARGEST_ALPHA).detach()


def _length(gradient: Tensor) -> Tensor:
    """The norm of a gradient over the rows of all processes, but for a factor that all gradients have."""
    return processes.summed(gradient.float().square().sum()).sqrt()

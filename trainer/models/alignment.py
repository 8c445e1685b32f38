"""Losses that draw an embedding to a target without asking for the target's orientation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer import processes
from trainer.errors import TrainError

CLASS_MEAN_MOMENTUM = 0.9
FEWEST_ALIKE = 3  # images: of two, each has one other, which takes all of its softmax whatever the similarity


def relational_loss(student: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL between row-softmaxed cosine similarities within the batch, averaged over images and P.

    student (B, C), target (B, P, D): the widths may differ, for only similarities are compared, each image's to the
    B − 1 others, of all processes. One image, or two, give 0. Source: similarities within a batch as the knowledge
    to transfer: Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019; Park et al., "Relational
    Knowledge Distillation", CVPR 2019; as distributions compared by KL: Passalis & Tefas, "Learning Deep
    Representations with Probabilistic Knowledge Transfer", ECCV 2018.
    """
    student, target = processes.gathered(student), processes.gathered(target)
    B = len(student)
    if B < 2:
        return student.sum() * 0.0
    with torch.autocast(student.device.type, enabled=False):
        student = F.normalize(student.float(), dim=-1)
        target = F.normalize(target.float(), dim=-1).transpose(0, 1)  # (P, B, D)
        itself = torch.eye(B, dtype=torch.bool, device=student.device)
        own = (student @ student.T / temperature).masked_fill(itself, -torch.inf)  # (B, B)
        wanted = (target @ target.transpose(1, 2) / temperature).masked_fill(itself, -torch.inf)  # (P, B, B)
        return _divergence(own.unsqueeze(0).expand_as(wanted), wanted)


def require_others(images: int, setting: str) -> None:
    """Raise TrainError where the similarities within so many images tell nothing: their loss would always be 0."""
    if images < FEWEST_ALIKE:
        raise TrainError(
            f"{setting}: similarities within {images} image{'s' * (images > 1)} tell nothing; raise --batch-size, or "
            "lower optim.accumulate, to have three at a time"
        )


def memory_loss(student: Tensor, target: Tensor, memory: Tensor, filled: Tensor, temperature: float) -> Tensor:
    """KL between the softmaxed cosine similarities of student and target to a memory of targets.

    student (B, D) in the target's space, target (B, P, D), memory (K, P, D) with filled (K,) bool. Averaged over
    images and P. The memory may hold an image's own target too, as there. Source: Fang et al., "SEED: Self-supervised
    Distillation for Visual Representation", ICLR 2021.
    """
    with torch.autocast(student.device.type, enabled=False):
        memory = F.normalize(memory.float(), dim=-1).permute(1, 2, 0)  # (P, D, K)
        own = F.normalize(student.float(), dim=-1) @ memory / temperature  # (P, B, K)
        wanted = F.normalize(target.float(), dim=-1).transpose(0, 1) @ memory / temperature  # (P, B, K)
        return _divergence(own.masked_fill(~filled, -torch.inf), wanted.masked_fill(~filled, -torch.inf))


def _divergence(own: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL(wanted ‖ own) of logits (P, B, K); places at −∞ in both count for nothing."""
    log_own, log_wanted = own.log_softmax(-1), wanted.log_softmax(-1)
    apart = torch.where(wanted.isinf(), 0.0, log_wanted) - torch.where(wanted.isinf(), 0.0, log_own)
    return (log_wanted.exp() * apart).sum(-1).mean()


def projector(channels: int, outputs: int) -> nn.Sequential:
    """A small MLP that stands between student and target while training, and is thrown away after it.

    Source: Miles & Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation", AAAI 2024.
    """
    hidden = 2 * outputs
    return nn.Sequential(
        nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, outputs)
    )  # fmt: skip


class Memory(nn.Module):
    """The last K targets, first in, first out: as many as there are training images, and it holds one of each."""

    values: Tensor
    taken: Tensor

    def __init__(self, size: int, kinds: int, channels: int):
        super().__init__()
        self.register_buffer("values", torch.zeros(size, kinds, channels))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))  # targets taken in so far

    @torch.no_grad()
    def add(self, targets: Tensor) -> None:
        """Take in (B, P, D), in place of the oldest."""
        size, targets = len(self.values), processes.gathered(targets)
        newest = targets.detach()[-size:].to(self.values.dtype)
        skipped = len(targets) - len(newest)
        places = (self.taken + skipped + torch.arange(len(newest), device=self.taken.device)) % size
        self.values.index_copy_(0, places, newest)
        self.taken += len(targets)

    @property
    def filled(self) -> Tensor:
        """Which places hold a target: (K,) bool."""
        return torch.arange(len(self.values), device=self.taken.device) < self.taken


class ClassMeans(nn.Module):
    """Moving means of the unit embeddings of each class, to be taken off: what is left is not said by the labels.

    Source: the within-class deviations of discriminant analysis (Fisher 1936), on moving means as in Wen et al., "A
    Discriminative Feature Learning Approach for Deep Face Recognition", ECCV 2016.
    """

    means: Tensor
    seen: Tensor

    def __init__(self, classes: int, kinds: int, channels: int):
        super().__init__()
        self.register_buffer("means", torch.zeros(classes, kinds, channels))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Take in embeddings (B, P, D) with labels (B,), -1 for unlabelled rows, which tell nothing of a class."""
        unit, labels = processes.gathered(F.normalize(embeddings.detach().float(), dim=-1)), processes.gathered(labels)
        # One row of scratch beyond the classes takes the unlabelled ones, so that none is picked out.
        places = torch.where(labels >= 0, labels, len(self.means))
        sums = unit.new_zeros(len(self.means) + 1, *unit.shape[1:]).index_add_(0, places, unit)[:-1]
        counts = unit.new_zeros(len(self.means) + 1).index_add_(0, places, torch.ones_like(unit[:, 0, 0]))[:-1]
        found = sums / counts.clamp_min(1).view(-1, 1, 1)
        moved = torch.where(self.seen.view(-1, 1, 1), self.means.lerp(found, 1 - CLASS_MEAN_MOMENTUM), found)
        self.means.copy_(torch.where((counts > 0).view(-1, 1, 1), moved, self.means))
        self.seen |= counts > 0

    def remove(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Unit embeddings (B, P, D) less the mean of their class; unlabelled ones less the mean of the class means."""
        unit = F.normalize(embeddings.float(), dim=-1)
        overall = self.means.sum(0) / self.seen.sum().clamp_min(1)
        mean = torch.where((labels >= 0).view(-1, 1, 1), self.means[labels.clamp_min(0)], overall)
        return unit - mean

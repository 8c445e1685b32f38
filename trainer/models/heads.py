"""The two losses of generative curriculum distillation: DRC (the task) and CAL (the alignment)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drc_loss(embeddings: Tensor, labels: Tensor, proxies: Tensor, tau: float) -> Tensor:
    """DRC (task): −log softmax_m( cos(E_{D,t_p}, P_m) / τ ) at the image's class, averaged over p ∈ P.

    embeddings (B, P, C) or (B, C), labels (B,) in 0..M-1 or -1 for "unlabelled", proxies (M, C). Rows with
    label -1 do not count; a batch without labels gives 0. Source: design §2, "DRC".
    """
    if embeddings.dim() == 2:
        embeddings = embeddings.unsqueeze(1)  # (B, 1, C)
    labelled = labels >= 0
    embeddings, labels = embeddings[labelled], labels[labelled]
    if not len(labels):
        return embeddings.sum() * 0.0 + proxies.sum() * 0.0
    # float32 whatever the autocast: dividing by τ magnifies rounding.
    cosines = F.normalize(embeddings.float(), dim=-1) @ F.normalize(proxies.float(), dim=-1).T  # (B, P, M)
    targets = labels.unsqueeze(1).expand(-1, cosines.shape[1])  # (B, P)
    return F.cross_entropy(cosines.flatten(0, 1) / tau, targets.flatten())


def cal_loss(
    student: Tensor,
    injected: Tensor,
    kind: Literal["raw", "normalized"] = "raw",
    stop_gradient: bool = False,
) -> Tensor:
    """CAL (alignment): ‖E_R − E_{D,t_p}‖², averaged over the images and over p ∈ P.

    student E_R (B, C), injected E_D (B, P, C). "raw" is the paper's squared Euclidean distance; "normalized"
    takes it between L2-normalised embeddings, which is 2 − 2·cos, in 0..4, and cannot be lowered by
    shrinking. `stop_gradient` makes E_D a fixed target. Source: design §2, "CAL".
    """
    student, injected = student.float(), injected.float()
    if stop_gradient:
        injected = injected.detach()
    if kind == "normalized":
        student, injected = F.normalize(student, dim=-1), F.normalize(injected, dim=-1)
    return (student.unsqueeze(1) - injected).square().sum(-1).mean()


def cal_ramp(update: int, total: int, warmup: float) -> float:
    """Scale of α at 0-based `update` of `total`: linear from 0 to 1 over the first `warmup` of the run.

    At the start the GIM cannot read the teacher yet, and E_R would be drawn to targets that mean nothing.
    """
    return min(1.0, update / (warmup * total)) if warmup else 1.0


class ProxyClassifier(nn.Module):
    """DRC with its learnable class proxies P_m (M, C)."""

    def __init__(self, classes: int, dim: int, tau: float):
        super().__init__()
        self.tau = tau
        self.proxies = nn.Parameter(torch.randn(classes, dim) / dim**0.5)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, C) or (B, P, C), labels (B,) with -1 for unlabelled rows: returns a scalar."""
        return drc_loss(embeddings, labels, self.proxies, self.tau)

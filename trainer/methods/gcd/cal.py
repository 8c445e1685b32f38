"""CAL: the loss that draws the student's embedding to what the teacher's features make of it."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def cal_loss(
    student: Tensor,
    injected: Tensor,
    kind: Literal["raw", "normalized"] = "raw",
    stop_gradient: bool = False,
) -> Tensor:
    """CAL (alignment): ‖E_R − E_{D,t_p}‖², averaged over the images and over p ∈ P.

    student E_R (B, C), injected E_D (B, P, C). "raw" is the paper's squared Euclidean distance; "normalized"
    takes it between L2-normalised embeddings, which is 2 − 2·cos, in 0..4, and cannot be lowered by
    shrinking. `stop_gradient` makes E_D a fixed target. Source: DiT-Distill, CVPR 2026, CAL.
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

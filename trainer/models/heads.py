"""The head that students are trained with: DRC, classification against learnable class proxies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def drc_loss(embeddings: Tensor, labels: Tensor, proxies: Tensor, tau: float) -> Tensor:
    """DRC (task): −log softmax_m( cos(E_{D,t_p}, P_m) / τ ) at the image's class, averaged over p ∈ P.

    embeddings (B, P, C) or (B, C), labels (B,) in 0..M-1 or -1 for "unlabelled", proxies (M, C). Rows with
    label -1 do not count; a batch without labels gives 0. Source: DiT-Distill, CVPR 2026, DRC.
    """
    if embeddings.dim() == 2:
        embeddings = embeddings.unsqueeze(1)  # (B, 1, C)
    # float32 whatever the autocast, which a cast alone does not stop from multiplying in bfloat16: dividing by τ
    # magnifies rounding.
    with torch.autocast(embeddings.device.type, enabled=False):
        cosines = F.normalize(embeddings.float(), dim=-1) @ F.normalize(proxies.float(), dim=-1).T  # (B, P, M)
        targets = labels.unsqueeze(1).expand(-1, cosines.shape[1])  # (B, P)
        # Summed and divided here, where cross_entropy's own mean would be 0 / 0 without labels; no row is picked out,
        # which would wait for the device.
        total = F.cross_entropy(cosines.flatten(0, 1) / tau, targets.flatten(), ignore_index=-1, reduction="sum")
        return total / (targets >= 0).sum().clamp_min(1)


class ProxyClassifier(nn.Module):
    """DRC with its learnable class proxies P_m (M, C)."""

    def __init__(self, classes: int, dim: int, tau: float):
        super().__init__()
        self.tau = tau
        self.proxies = nn.Parameter(torch.randn(classes, dim) / dim**0.5)

    def no_weight_decay(self) -> set[str]:
        """Proxies have none: they are as long as they are, for only their direction counts."""
        return {"proxies"}

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings (B, C) or (B, P, C), labels (B,) with -1 for unlabelled rows: returns a scalar."""
        return drc_loss(embeddings, labels, self.proxies, self.tau)

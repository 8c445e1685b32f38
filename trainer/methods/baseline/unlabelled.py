"""What a student without a teacher may learn from unlabelled images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import AugmentConfig
from trainer.data.augmentation import DRAWS, augment_image

STRONG = AugmentConfig(color=0.4, erase=0.5)  # beside a mirror image of every second one


def strongly_changed(images: Tensor) -> Tensor:
    """Images (U, 3, S, S) uint8 in other colours, with patches covered, half of them mirrored.

    Drawn from torch's global state, which a run seeds for each update.
    """
    numbers = torch.rand(len(images), DRAWS + 1, dtype=torch.float64).numpy()
    changed = [_change(image, draw) for image, draw in zip(images, numbers, strict=True)]
    return torch.stack(changed)


def _change(image: Tensor, numbers: np.ndarray) -> Tensor:
    changed = augment_image(image, STRONG, numbers[:DRAWS])
    return changed.flip(-1) if numbers[DRAWS] < 0.5 else changed


def pseudo_label_loss(weak: Tensor, strong: Tensor, proxies: Tensor, tau: float, threshold: float) -> Tensor:
    """Cross-entropy of changed images against the class that the unchanged ones are given with enough confidence.

    weak, strong (U, C), proxies (M, C). Images below `threshold` count as 0 in the mean. Source: Sohn et al.,
    "FixMatch", NeurIPS 2020.
    """
    with torch.autocast(weak.device.type, enabled=False):
        unit = F.normalize(proxies.float(), dim=-1)
        confidence, label = (F.normalize(weak.detach().float(), dim=-1) @ unit.detach().T / tau).softmax(-1).max(-1)
        logits = F.normalize(strong.float(), dim=-1) @ unit.T / tau  # (U, M)
        return (F.cross_entropy(logits, label, reduction="none") * (confidence >= threshold)).mean()


def consistency_loss(weak: Tensor, strong: Tensor) -> Tensor:
    """2 − 2 cos between embeddings (U, C) of an image and of the same changed; the former is a fixed target.

    Source: Laine & Aila, "Temporal Ensembling for Semi-Supervised Learning" (Π-model), ICLR 2017.
    """
    return (2 - 2 * F.cosine_similarity(strong.float(), weak.detach().float(), dim=-1)).mean()

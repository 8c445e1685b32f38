"""Changes to student images that leave the teacher's features of the same view true."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def jitter_color(images: Tensor, random: np.random.Generator, strength: float = 0.3) -> Tensor:
    """Scale brightness, contrast and saturation of each image by 1 ± `strength`: (B, 3, S, S) uint8, same out."""
    draw = 1 + strength * (2 * random.random((len(images), 3)) - 1)
    brightness, contrast, saturation = torch.from_numpy(draw).float().view(-1, 3, 1, 1, 1).unbind(1)
    x = images.float() * brightness
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
    x = torch.lerp(x.mean(1, keepdim=True), x, saturation)
    return x.round_().clamp_(0, 255).to(torch.uint8)

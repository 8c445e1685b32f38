"""Pixels as a VAE takes and gives them."""

import torch
from torch import Tensor


def to_signed(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) to float in [−1, 1], as diffusers' VaeImageProcessor does."""
    return images.to(torch.float32) / 127.5 - 1.0


def from_signed(images: Tensor) -> Tensor:
    """The inverse: float (B, 3, H, W) in about [−1, 1] to uint8, values outside clipped."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

"""Latents as tokens: every family's DiT sees each 2×2 patch of the VAE's latents as one token."""

from torch import Tensor


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H/2·W/2, 4C): each 2×2 patch becomes one token, as in diffusers' FLUX pipelines."""
    B, C, H, W = latents.shape
    patches = latents.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)  # B, h, w, C, 2, 2
    return patches.reshape(B, (H // 2) * (W // 2), 4 * C)


def unpack_latents(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse: (B, rows·columns, 4C) → (B, C, 2·rows, 2·columns)."""
    B, _, C4 = tokens.shape
    patches = tokens.reshape(B, rows, columns, C4 // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(B, C4 // 4, 2 * rows, 2 * columns)

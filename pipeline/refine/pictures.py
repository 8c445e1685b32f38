"""Pictures of Stage I: what the DiT makes of an object at each noise level of the curriculum."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from pipeline.curriculum import add_noise, sample_noise
from pipeline.datasets.base import Sample
from pipeline.inputs.conditions import Conditions
from pipeline.teachers.base import Teacher

_CELL = 160
_MARGIN = 4
_HEAD = 22


@torch.no_grad()
def reconstruct(
    teacher: Teacher, conditions: Conditions, samples: Sequence[Sample], sigma: float, seed: int
) -> torch.Tensor:
    """The one-step estimate of the clean object, ẑ_O = X_t + σ·E_{O,t}: packed latents (B, L, C_latent)."""
    shape = tuple(conditions.object.shape[1:])
    noise = torch.stack([sample_noise(s.id, "canonical", seed, shape) for s in samples]).to(conditions.object)
    level = torch.full((len(samples),), sigma).to(conditions.object.device)
    noisy = add_noise(conditions.object, noise, level)
    return noisy + sigma * teacher.predict(noisy, conditions.context, level, conditions.text)


def draw_reconstructions(
    teacher: Teacher,
    conditions: Conditions,
    samples: Sequence[Sample],
    timesteps: Sequence[int],
    num_steps: int,
    seed: int,
) -> Image.Image:
    """A row per image: the context, the object as the VAE keeps it, and the estimate at every timestep.

    The VAE is in memory only while it decodes, after the last forward pass.
    """
    sigmas = teacher.sigmas(num_steps)
    latents = [("context", conditions.context), ("object", conditions.object)]
    for p in timesteps:
        title = f"p = {p}, sigma {sigmas[p - 1]:.2f}"
        latents.append((title, reconstruct(teacher, conditions, samples, sigmas[p - 1], seed)))
    try:
        columns = [(title, teacher.decode_images(found)) for title, found in latents]
    finally:
        teacher.release("vae")
    step = _CELL + _MARGIN
    sheet = Image.new("RGB", (len(columns) * step + _MARGIN, _HEAD + len(samples) * step), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for x, (title, pixels) in enumerate(columns):
        pen.text((_MARGIN + x * step, 4), title, fill="black", font=font)
        for y, image in enumerate(pixels.cpu().numpy()):
            cell = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
            sheet.paste(cell.resize((_CELL, _CELL), Image.Resampling.BICUBIC), (_MARGIN + x * step, _HEAD + y * step))
    return sheet

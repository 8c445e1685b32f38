"""Changes to student images that leave the teacher's features of the same view true."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Images to be cropped are kept larger than the student sees them by this: a crop of 9/16 of the area is not enlarged.
CROP_SOURCE = 4 / 3
LARGEST_RATIO = 4 / 3  # width to height of a crop, or its reciprocal


def draw_crops(count: int, random: np.random.Generator, smallest: float) -> np.ndarray:
    """Boxes of random crops, `smallest` to 1 of the image's area: (count, 4) float64 as (left, top, right, bottom),
    in fractions of width and height.

    The distributions are those of Inception's random resized crop; where a side would be longer than the image, it is
    the image's.
    """
    draw = random.random((count, 4))  # a row an image: what an image is given does not depend on those after it
    area = smallest + (1 - smallest) * draw[:, 0]
    ratio = np.exp(math.log(LARGEST_RATIO) * (2 * draw[:, 1] - 1))
    sides = np.minimum(np.sqrt(np.stack([area * ratio, area / ratio], axis=1)), 1.0)  # (count, 2): width, height
    corner = draw[:, 2:] * (1 - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def crop(images: Tensor, boxes: np.ndarray, size: int) -> Tensor:
    """Cut a box out of each image and resize it (bicubic, antialiased): (B, 3, S, S) uint8 -> (B, 3, size, size)."""
    # By Pillow, not torch: this runs beside the thread that trains, which needs the cores for itself.
    side = images.shape[-1]
    cut = [
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize(
            (size, size), Image.Resampling.BICUBIC, box=tuple(box)
        )
        for image, box in zip(images.numpy(), boxes * side, strict=True)
    ]
    return torch.from_numpy(np.stack([np.asarray(image).transpose(2, 0, 1) for image in cut]))


def jitter_color(images: Tensor, random: np.random.Generator, strength: float = 0.3) -> Tensor:
    """Scale brightness, contrast and saturation of each image by 1 ± `strength`: (B, 3, S, S) uint8, same out."""
    draw = 1 + strength * (2 * random.random((len(images), 3)) - 1)
    brightness, contrast, saturation = torch.from_numpy(draw).float().view(-1, 3, 1, 1, 1).unbind(1)
    x = images.float() * brightness
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
    x = torch.lerp(x.mean(1, keepdim=True), x, saturation)
    return x.round_().clamp_(0, 255).to(torch.uint8)

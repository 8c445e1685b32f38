"""Changes to student images that leave the teacher's features of the same view true, all by torchvision.

What is random in them is drawn as numbers beforehand, from a generator of the batch alone: torchvision's own draws come
from torch's global state, which other threads use at the same time.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from trainer.config import AugmentConfig

DRAWS = 13  # uniform numbers that an image takes: 4 for the crop, 4 for the colours, 5 for the patch
CROP_RATIOS = (3 / 4, 4 / 3)  # width to height, as of Inception and RandomResizedCrop
PATCH_AREAS, PATCH_RATIOS = (0.02, 0.33), (0.3, 3.3)  # Zhong et al., Random Erasing, AAAI 2020

_thread = threading.local()


def draw_numbers(random: np.random.Generator, images: int) -> np.ndarray:
    """(images, DRAWS) float64 in [0, 1): those of the first images do not depend on how many follow."""
    return random.random((images, DRAWS))


def random_crop(
    picture: np.ndarray, size: int, scale: tuple[float, float], numbers: np.ndarray
) -> tuple[Tensor, tuple[float, float, float, float]]:
    """A crop of `scale` of the area of a picture (H, W, 3) uint8, resized to (3, size, size) uint8, and its box.

    The box is (left, top, right, bottom) in fractions of the picture's sides. A crop that would be longer than the
    picture is cut to it, where torchvision would draw again.
    """
    _stay_in_one_thread()
    height, width = picture.shape[:2]
    h, w, top, left = _box(height, width, scale, CROP_RATIOS, numbers)
    pixels = torch.tensor(picture).permute(2, 0, 1)
    box = left / width, top / height, (left + w) / width, (top + h) / height
    return F.resized_crop(pixels, top, left, h, w, [size, size], InterpolationMode.BICUBIC, antialias=True), box


def change_colors(image: Tensor, config: AugmentConfig, numbers: np.ndarray) -> Tensor:
    """Brightness, contrast and saturation times 1 ± `color`, hue turned by ± `hue` of the circle; (3, S, S) uint8."""
    _stay_in_one_thread()
    if config.color:
        factors = (1 + config.color * (2 * numbers[:3] - 1)).tolist()
        for adjust, factor in zip((F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), factors, strict=True):
            image = adjust(image, factor)
    if config.hue:
        image = F.adjust_hue(image, config.hue * (2 * float(numbers[3]) - 1))
    return image


def erase_patch(image: Tensor, chance: float, numbers: np.ndarray) -> Tensor:
    """With a chance, cover a patch of (3, S, S) uint8 by the image's mean colour."""
    if numbers[0] >= chance:
        return image
    _stay_in_one_thread()
    h, w, top, left = _box(image.shape[1], image.shape[2], PATCH_AREAS, PATCH_RATIOS, numbers[1:])
    mean = image.float().mean((1, 2), keepdim=True).to(torch.uint8)
    return F.erase(image, top, left, h, w, mean.expand(-1, h, w))


def augment_image(image: Tensor, config: AugmentConfig, numbers: np.ndarray) -> Tensor:
    """All that is done after the crop, to one image (3, S, S) uint8."""
    image = change_colors(image, config, numbers[4:8])
    return erase_patch(image, config.erase, numbers[8:]) if config.erase else image


def _box(
    height: int, width: int, areas: tuple[float, float], ratios: tuple[float, float], numbers: np.ndarray
) -> tuple[int, int, int, int]:
    """(height, width, top, left) of a random part: its share of the area and the logarithm of its ratio are uniform."""
    area = height * width * (areas[0] + (areas[1] - areas[0]) * numbers[0])
    low, high = (math.log(ratio) for ratio in ratios)
    ratio = math.exp(low + (high - low) * numbers[1])
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    return h, w, int(numbers[2] * (height - h + 1)), int(numbers[3] * (width - w + 1))


def _stay_in_one_thread() -> None:
    """Keep torch's operations in the thread that prepares images, once for each such thread.

    They are small, and a second team of OpenMP threads would take the cores from the one that trains. The number
    belongs to the calling thread, whose own is left alone where it is the main one.
    """
    if not getattr(_thread, "single", False) and threading.current_thread() is not threading.main_thread():
        torch.set_num_threads(1)
    _thread.single = True

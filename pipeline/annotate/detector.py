"""Where the object is: zero-shot detection with the super-class as the only label."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from pipeline.annotate.models import ModelFiles, load_model
from pipeline.inputs.views import Box

OPTION = "--detector"
_MOST_ELONGATED = 50


@dataclass(frozen=True)
class Detection:
    """box: (x0, y0, x1, y1) in pixels of the image, padded and clipped; score: the detector's, from 0 to 1."""

    box: Box
    score: float


def pad_and_clip(box: Box, size: tuple[int, int], padding: float) -> Box | None:
    """A box grown by `padding` of its width and height on each side, clipped to an image of size (width, height).

    None where less than a pixel of it is inside the image, or a coordinate is not finite.
    """
    if not all(map(math.isfinite, box)):
        return None
    x0, y0, x1, y1 = box
    dx, dy = padding * (x1 - x0), padding * (y1 - y0)
    width, height = size
    clipped = (max(0.0, x0 - dx), max(0.0, y0 - dy), min(float(width), x1 + dx), min(float(height), y1 + dy))
    return clipped if clipped[2] - clipped[0] >= 1 and clipped[3] - clipped[1] >= 1 else None


class Detector:
    """A detector of transformers' AutoModelForZeroShotObjectDetection (GroundingDINO, OWLv2, …), in float32.

    Half precision would save little (GroundingDINO-base has 0.9 GB) and moves boxes.
    """

    def __init__(self, files: ModelFiles, device: str) -> None:
        from transformers import AutoModelForZeroShotObjectDetection

        self._processor, self._model = load_model(
            AutoModelForZeroShotObjectDetection, files, OPTION, torch.float32, device
        )

    def detect(
        self, images: Sequence[Image.Image], superclass: str, threshold: float, padding: float
    ) -> list[Detection | None]:
        """The most certain box of each RGB image whose score is above the threshold; None where there is none."""
        found: list[Detection | None] = [None] * len(images)
        sizes: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            # Scaled to the detector's size, nothing would be left of the shorter side.
            if max(image.size) > _MOST_ELONGATED * min(image.size):
                continue
            sizes.setdefault(image.size, []).append(i)
        # Images of unequal size would be padded, and an image's box would depend on its neighbours.
        for rows in sizes.values():
            detections = self._detect_equal([images[i] for i in rows], superclass, threshold, padding)
            for i, detection in zip(rows, detections, strict=True):
                found[i] = detection
        return found

    @torch.inference_mode()
    def _detect_equal(
        self, images: list[Image.Image], superclass: str, threshold: float, padding: float
    ) -> list[Detection | None]:
        # A list of labels per image is what every processor takes; GroundingDINO's makes "a bird." of it.
        labels = [[f"{'an' if superclass[:1] in 'aeiou' else 'a'} {superclass}"] for _ in images]
        inputs = self._processor(images=images, text=labels, return_tensors="pt").to(self._model.device)
        results = self._processor.post_process_grounded_object_detection(
            self._model(**inputs),
            threshold=threshold,
            target_sizes=[(image.height, image.width) for image in images],
            text_labels=labels,
        )
        return [_best(r, image.size, padding) for r, image in zip(results, images, strict=True)]


def _best(result: dict, size: tuple[int, int], padding: float) -> Detection | None:
    scores, boxes = result["scores"].tolist(), result["boxes"].tolist()
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        x0, y0, x1, y1 = boxes[i]
        if box := pad_and_clip((x0, y0, x1, y1), size, padding):
            return Detection(box, scores[i])
    return None

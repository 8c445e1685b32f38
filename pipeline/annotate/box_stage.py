"""The first stage: every image is read once, digested, and given a box."""

import hashlib
from collections.abc import Sequence
from typing import Any

from PIL import Image

from pipeline.annotate.config import AnnotateConfig
from pipeline.annotate.detector import Detection, Detector, pad_and_clip
from pipeline.annotate.models import ModelFiles
from pipeline.annotate.work import Rows
from pipeline.datasets.base import Dataset, Sample
from pipeline.device import choose_device
from pipeline.inputs.decoding import UNREADABLE, box_on_stored_pixels, decode_image, decode_with_box, reason_of
from pipeline.inputs.views import Box


class BoxStage:
    """Boxes for batches of samples. The detector is loaded when it is first needed, and dropped with this object."""

    def __init__(self, dataset: Dataset, config: AnnotateConfig, files: ModelFiles | None) -> None:
        self._dataset, self._config, self._files = dataset, config, files
        self._detector: Detector | None = None

    def __call__(self, batch: Sequence[int]) -> Rows:
        """Index → sha256, box on the stored pixels, box_source, box_score, and the reason where there is no box."""
        rows: Rows = {}
        encoded: dict[int, bytes] = {}
        images: dict[int, Image.Image] = {}
        for i in batch:
            rows[i] = {"sha256": None, "box": None, "box_source": "unreadable", "box_score": None, "reason": ""}
            try:
                encoded[i] = self._dataset.read(self._dataset.samples[i])
                rows[i]["sha256"] = hashlib.sha256(encoded[i]).hexdigest()
                images[i] = decode_image(encoded[i])
            except UNREADABLE as error:
                rows[i]["reason"] = reason_of(error)
        if self._config.boxes == "detector":
            found = self._detect(list(images.values()))
            chosen = {i: self._detected(image, d) for (i, image), d in zip(images.items(), found, strict=True)}
        else:
            chosen = {i: self._given(self._dataset.samples[i], encoded[i], image) for i, image in images.items()}
        for i, row in chosen.items():
            if row["box"] is None:
                rows[i]["reason"] = f"box {self._dataset.samples[i].box} has no pixel inside the image"
            else:
                rows[i] |= row | {"box": list(box_on_stored_pixels(encoded[i], images[i], row["box"]))}
        return rows

    def _detect(self, images: list[Image.Image]) -> list[Detection | None]:
        if self._detector is None:
            assert self._files is not None
            self._detector = Detector(self._files, str(choose_device(self._config.device)))
        c = self._config
        return self._detector.detect(images, self._dataset.superclass, c.box_threshold, c.padding)

    def _detected(self, image: Image.Image, detection: Detection | None) -> dict[str, Any]:
        if detection is None:
            return {"box": _whole(image), "box_source": "none-found", "box_score": None}
        return {"box": detection.box, "box_source": "detector", "box_score": detection.score}

    def _given(self, sample: Sample, encoded: bytes, image: Image.Image) -> dict[str, Any]:
        if self._config.boxes == "full" or sample.box is None:
            return {"box": _whole(image), "box_source": "full", "box_score": None}
        _, box = decode_with_box(encoded, sample.box)
        return {
            "box": pad_and_clip(box, image.size, self._config.padding),
            "box_source": sample.box_source,
            "box_score": None,
        }


def _whole(image: Image.Image) -> Box:
    return (0.0, 0.0, float(image.width), float(image.height))

"""The second stage: every object is described, and descriptions that name the class are mended."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from pipeline.annotate.captioner import STRICTER, Captioner, crop_object, fill_in
from pipeline.annotate.config import AnnotateConfig
from pipeline.annotate.leaks import LeakCheck
from pipeline.annotate.models import ModelFiles
from pipeline.annotate.work import Rows
from pipeline.datasets.base import Dataset, Sample
from pipeline.device import choose_device, choose_dtype
from pipeline.inputs.conditions import caption_of
from pipeline.inputs.decoding import UNREADABLE, decode_with_box, reason_of

NO_CAPTION: dict[str, Any] = {"caption": None, "caption_source": "none", "leak": ""}


class CaptionStage:
    """Captions for batches of samples; `boxes` has their boxes. The captioner is loaded when it is first needed."""

    def __init__(self, dataset: Dataset, config: AnnotateConfig, files: ModelFiles | None, boxes: Rows) -> None:
        self._dataset, self._config, self._files, self._boxes = dataset, config, files, boxes
        self._captioner: Captioner | None = None
        self._check = LeakCheck((s.class_name for s in dataset.samples), dataset.superclass)

    def __call__(self, batch: Sequence[int]) -> Rows:
        """Index → caption, caption_source and leak; and the reason for an image that cannot be read any more."""
        if self._config.captions == "none":
            return dict.fromkeys(batch, NO_CAPTION)
        if self._config.captions == "dataset":
            return {i: self._given(self._dataset.samples[i]) for i in batch}
        rows: Rows = {}
        crops: dict[int, Image.Image] = {}
        for i in batch:
            try:
                image, box = decode_with_box(self._dataset.read(self._dataset.samples[i]), self._boxes[i]["box"])
                crops[i] = crop_object(image, box, self._config.crop_side)
            except UNREADABLE as error:
                rows[i] = NO_CAPTION | {"reason": reason_of(error)}
        return rows | self._described(crops)

    def _given(self, sample: Sample) -> dict[str, Any]:
        if not sample.caption.strip():
            return NO_CAPTION
        leak = "left" if self._check.leaks(sample.caption, sample.class_name) else "clean"
        return {"caption": sample.caption, "caption_source": "dataset", "leak": leak}

    def _described(self, crops: dict[int, Image.Image]) -> Rows:
        instruction = fill_in(self._config.instruction, self._dataset.superclass)
        captions = dict(zip(crops, self._ask(list(crops.values()), instruction), strict=True))
        leaking = [i for i, caption in captions.items() if self._leaks(i, caption)]
        stricter = instruction + fill_in(STRICTER, self._dataset.superclass)
        again = dict(zip(leaking, self._ask([crops[i] for i in leaking], stricter), strict=True))
        rows: Rows = {}
        for i, first in captions.items():
            caption, leak = again.get(i, first), "asked-again" if i in again else "clean"
            if i in again and self._leaks(i, caption):
                caption, leak = self._check.strip(caption, self._dataset.samples[i].class_name), "stripped"
            rows[i] = {"caption": caption, "caption_source": "vlm", "leak": leak}
            if not caption:
                neutral = caption_of(replace(self._dataset.samples[i], caption=""), self._dataset.superclass)
                rows[i] |= {"caption": neutral, "caption_source": "neutral"}
        return rows

    def _leaks(self, i: int, caption: str) -> list[str]:
        return self._check.leaks(caption, self._dataset.samples[i].class_name)

    def _ask(self, crops: list[Image.Image], instruction: str) -> list[str]:
        if not crops:
            return []
        if self._captioner is None:
            assert self._files is not None
            c = self._config
            device = choose_device(c.device)
            self._captioner = Captioner(self._files, choose_dtype(c.dtype, device), str(device), c.max_new_tokens)
        return self._captioner.describe(crops, instruction)

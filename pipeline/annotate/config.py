"""The configuration of an annotation."""

from dataclasses import dataclass
from typing import Literal

from pipeline.annotate.captioner import DEFAULT as DEFAULT_CAPTIONER
from pipeline.annotate.captioner import INSTRUCTION
from pipeline.annotate.detector import DEFAULT as DEFAULT_DETECTOR
from pipeline.annotate.models import AnnotateError
from pipeline.device import DtypeName


@dataclass(frozen=True)
class AnnotateConfig:
    """What to annotate with what.

    box_threshold: a detection's score must be above it. padding: share of a detected box's sides that is added around
    it. crop_side: the longer side of what the captioner sees, in pixels, at most. dtype: of the captioner. batch:
    images per forward pass. save_every: images after which a resumed run need not do them again.
    """

    boxes: Literal["detector", "dataset", "full"] = "detector"
    captions: Literal["vlm", "dataset", "none"] = "vlm"
    detector: str = DEFAULT_DETECTOR
    detector_revision: str | None = None
    box_threshold: float = 0.3
    padding: float = 0.05
    captioner: str = DEFAULT_CAPTIONER
    captioner_revision: str | None = None
    instruction: str = INSTRUCTION
    max_new_tokens: int = 96
    crop_side: int = 768
    dtype: DtypeName = "auto"
    device: str = "auto"
    batch: int = 8
    save_every: int = 64

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "crop_side", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise AnnotateError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        for name in ("box_threshold", "padding"):
            if not 0 <= getattr(self, name) <= 1:
                raise AnnotateError(f"--{name.replace('_', '-')} must lie from 0 to 1, not {getattr(self, name)}")
        if not self.instruction.strip():
            raise AnnotateError("--instruction is empty; leave it out to use the built-in one")

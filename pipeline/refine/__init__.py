"""Stage I, condition difference refining (CDR): a LoRA teaches the frozen DiT to use the context image (§2)."""

from pipeline.refine.config import RefineConfig
from pipeline.refine.loop import refine
from pipeline.refine.loss import cdr_loss

__all__ = ["RefineConfig", "cdr_loss", "refine"]

"""Stage I, condition difference refining (CDR, DiT-Distill): a LoRA teaches the frozen DiT to use the context image."""

from typing import TYPE_CHECKING, Any

from pipeline.refine.config import RefineConfig

if TYPE_CHECKING:
    from pipeline.refine.loop import refine
    from pipeline.refine.loss import cdr_loss

__all__ = ["RefineConfig", "cdr_loss", "refine"]


def __getattr__(name: str) -> Any:
    # The settings can be read without waiting for diffusers, peft and accelerate.
    if name == "refine":
        from pipeline.refine.loop import refine

        return refine
    if name == "cdr_loss":
        from pipeline.refine.loss import cdr_loss

        return cdr_loss
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""`dit-cache refine`."""

from pathlib import Path
from typing import Annotated

import typer

from cache_schema.options import Exposed
from cache_schema.settings import Values
from pipeline.commands.options import (
    ANNOTATIONS,
    CONDITIONS,
    DATASET,
    FORWARD,
    IMAGES,
    LIMIT,
    PRECISION,
    TEACHER,
    DebugOption,
    configured_by,
)
from pipeline.config import configure
from pipeline.presets import run_folder


@configured_by(
    DATASET, *IMAGES, ANNOTATIONS, LIMIT, *TEACHER,
    "refine.steps", "refine.batch", "refine.accumulate", "refine.lr", "refine.rank", "refine.lora_targets",
    "refine.sigma", "refine.grad_clip", "refine.caption_dropout", Exposed("refine.flip", "--flip/--no-flip"),
    "refine.train_guidance",
    "refine.validation_images",
    "refine.validate_every", "refine.checkpoint_every", "refine.pictures_every", "refine.gradient_checkpointing",
    "refine.seed", CONDITIONS, *PRECISION, *FORWARD, "teacher.compile",
)  # fmt: skip
def refine(
    given: Values,
    output: Annotated[Path | None, typer.Option(help="Folder of the LoRA; default runs/<dataset>/lora.")] = None,
    debug: DebugOption = False,
) -> None:
    """Stage I: refine the frozen DiT with a LoRA so that it uses the context image (condition difference refining).

    The same command goes on where an interrupted run stopped. For several
    GPUs: torchrun --nproc-per-node 8 -m pipeline.cli refine …
    """
    from pipeline.chain.steps import refine_teacher

    config = configure(given)
    refine_teacher(config, output or run_folder(config.data.name) / "lora")

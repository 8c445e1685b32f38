"""`dit-cache refine`."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import (
    AnnotationsOption,
    CompileOption,
    ConditionsOption,
    ContextOption,
    DataOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    LimitOption,
    QuantizeOption,
    ResolutionOption,
    RevisionOption,
    SuperclassOption,
    TeacherOption,
    TrainClassesOption,
    TrainRatioOption,
    parse_classes,
)
from pipeline.presets import run_folder


def refine(
    dataset: DatasetOption = "demo",
    data: DataOption = None,
    train_classes: TrainClassesOption = None,
    train_ratio: TrainRatioOption = None,
    superclass: SuperclassOption = None,
    annotations: AnnotationsOption = None,
    teacher: TeacherOption = None,
    revision: RevisionOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the LoRA; default runs/<dataset>/lora.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; default 30000, demo 200.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step; default 1, demo 8.")] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Batches per step, and per process, whose gradients add up.", show_default="1")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of Adam.", show_default="0.0001")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA.", show_default="16")] = None,
    validation_images: Annotated[
        int | None, typer.Option(help="Training images held out to measure progress.", show_default="32")
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between measurements on held-out images.", show_default="1000")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0 writes none.", show_default="500")
    ] = None,
    pictures_every: Annotated[
        int | None,
        typer.Option(help="Steps between pictures of reconstructions; 0 draws none.", show_default="5000"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(help="Compute activations twice instead of keeping them; default on a GPU.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initialisation, order and noise.", show_default="0")] = None,
    conditions: ConditionsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    resolution: ResolutionOption = None,
    guidance: GuidanceOption = None,
    context: ContextOption = None,
    quantize: QuantizeOption = None,
    compile_blocks: CompileOption = None,
    limit: LimitOption = None,
    debug: DebugOption = False,
) -> None:
    """Stage I: refine the frozen DiT with a LoRA so that it uses the context image (condition difference refining).

    The same command goes on where an interrupted run stopped. For several
    GPUs: torchrun --nproc-per-node 8 -m pipeline.cli refine …
    """
    from pipeline.chain.steps import refine_teacher
    from pipeline.config import make_config

    config = make_config(
        dataset, teacher, conditions=conditions,
        data__root=data, data__limit=limit, data__train_classes=parse_classes(train_classes),
        data__train_ratio=train_ratio, data__superclass=superclass, data__annotations=annotations,
        teacher__revision=revision, teacher__resolution=resolution, teacher__guidance=guidance,
        teacher__context=context, teacher__quantize=quantize,
        teacher__compile=compile_blocks, teacher__dtype=dtype, teacher__device=device,
        refine__steps=steps, refine__batch=batch, refine__accumulate=accumulate, refine__lr=lr, refine__rank=rank,
        refine__seed=seed, refine__gradient_checkpointing=gradient_checkpointing,
        refine__validation_images=validation_images, refine__validate_every=validate_every,
        refine__checkpoint_every=checkpoint_every, refine__pictures_every=pictures_every,
    )  # fmt: skip
    refine_teacher(config, output or run_folder(dataset) / "lora")

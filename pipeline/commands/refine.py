"""`dit-cache refine`."""

from pathlib import Path
from typing import Annotated

import typer

from cache_schema.errors import DitDistillError
from pipeline.options import (
    AnnotationsOption,
    CompileOption,
    ConditionsOption,
    ContextOption,
    DataOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    GuidanceOption,
    LimitOption,
    Quantize,
    QuantizeOption,
    ResolutionOption,
    RevisionOption,
    SuperclassOption,
    TeacherOption,
    TrainClassesOption,
    TrainRatioOption,
    open_inputs,
)
from pipeline.presets import preset_for, run_folder


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
    accumulate: Annotated[int, typer.Option(help="Batches per step, and per process, whose gradients add up.")] = 1,
    lr: Annotated[float | None, typer.Option(help="Learning rate of Adam; default 1e-4.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")] = 16,
    validation_images: Annotated[int, typer.Option(help="Training images held out to measure progress.")] = 32,
    validate_every: Annotated[int, typer.Option(help="Steps between measurements on held-out images.")] = 1000,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 writes none.")] = 500,
    pictures_every: Annotated[
        int, typer.Option(help="Steps between pictures of reconstructions; 0 draws none.")
    ] = 5000,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(help="Compute activations twice instead of keeping them; default on a GPU.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order and noise.")] = 0,
    conditions: ConditionsOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    resolution: ResolutionOption = None,
    guidance: GuidanceOption = 3.5,
    context: ContextOption = None,
    quantize: QuantizeOption = Quantize.none,
    compile_blocks: CompileOption = False,
    limit: LimitOption = None,
    debug: DebugOption = False,
) -> None:
    """Stage I: refine the frozen DiT with a LoRA so that it uses the context image (condition difference refining).

    The same command goes on where an interrupted run stopped. For several
    GPUs: torchrun --nproc-per-node 8 -m pipeline.cli refine …
    """
    preset = preset_for(dataset)
    if compile_blocks and quantize.kind:
        raise DitDistillError(
            "--compile: PyTorch cannot compile gradients through weights of 8 bits; leave out --compile or --quantize"
        )
    opened, loaded = open_inputs(
        dataset, data, teacher, revision, None, dtype, device, resolution, guidance, limit,
        train_classes=train_classes, train_ratio=train_ratio, superclass=superclass, annotations=annotations,
        context=context, quantize=quantize, compile_blocks=compile_blocks,
    )  # fmt: skip
    from pipeline.refine import RefineConfig
    from pipeline.refine import refine as run_refine

    config = RefineConfig(
        steps=preset.refine_steps if steps is None else steps,
        batch=preset.refine_batch if batch is None else batch,
        accumulate=accumulate,
        lr=preset.refine_lr if lr is None else lr,
        rank=rank,
        seed=seed,
        validation_images=validation_images,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
        pictures_every=pictures_every,
        gradient_checkpointing=loaded.device.type == "cuda"
        if gradient_checkpointing is None
        else gradient_checkpointing,
    )
    run_refine(loaded, opened, config, output or run_folder(dataset) / "lora", conditions=conditions)

"""`dit-cache probe`."""

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
    OffloadOption,
    QuantizeOption,
    ResolutionOption,
    RevisionOption,
    SuperclassOption,
    TeacherOption,
    TrainClassesOption,
    TrainRatioOption,
    parse_classes,
    parse_names,
    parse_numbers,
)
from pipeline.presets import run_folder


def probe(
    dataset: DatasetOption = "demo",
    data: DataOption = None,
    train_classes: TrainClassesOption = None,
    train_ratio: TrainRatioOption = None,
    superclass: SuperclassOption = None,
    annotations: AnnotationsOption = None,
    teacher: TeacherOption = None,
    revision: RevisionOption = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA of Stage I (folder or file).")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; default runs/<dataset>/probe.")] = None,
    taps: Annotated[str | None, typer.Option(help="Taps to compare, or all.", show_default="all")] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(help="Timesteps to compare, or all of 1 to --num-steps.", show_default="4,7,10,13,16,19,22,25,28"),
    ] = None,
    num_steps: Annotated[int | None, typer.Option(help="Length T of the scheduler.", show_default="28")] = None,
    images: Annotated[int | None, typer.Option(help="Images to look at, about.", show_default="300")] = None,
    per_class: Annotated[int | None, typer.Option(help="Images of each class.", show_default="10")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Where they come from; choosing on test would be choosing on the test set.", show_default="train"
        ),
    ] = None,
    cells: Annotated[
        int | None, typer.Option(help="Features are averaged over N x N places, then flattened.", show_default="4")
    ] = None,
    recommend: Annotated[int | None, typer.Option(help="How many timesteps to recommend.", show_default="4")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.", show_default="0")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per forward pass.", show_default="4")] = None,
    conditions: ConditionsOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    resolution: ResolutionOption = None,
    guidance: GuidanceOption = None,
    context: ContextOption = None,
    quantize: QuantizeOption = None,
    offload: OffloadOption = None,
    compile_blocks: CompileOption = None,
    limit: LimitOption = None,
    debug: DebugOption = False,
) -> None:
    """Compare taps and timesteps before caching: retrieval, linear separability, high-frequency ratio of each."""
    from pipeline.chain.steps import probe_teacher
    from pipeline.config import make_config
    from pipeline.curriculum import DEFAULT_STEPS

    every = range(1, (num_steps or DEFAULT_STEPS) + 1)
    config = make_config(
        dataset, teacher, conditions=conditions,
        data__root=data, data__limit=limit, data__train_classes=parse_classes(train_classes),
        data__train_ratio=train_ratio, data__superclass=superclass, data__annotations=annotations,
        teacher__revision=revision, teacher__resolution=resolution, teacher__guidance=guidance,
        teacher__context=context, teacher__quantize=quantize,
        teacher__offload=offload, teacher__compile=compile_blocks, teacher__dtype=dtype, teacher__device=device,
        probe__taps=() if taps == "all" else parse_names(taps),
        probe__timesteps=tuple(every) if timesteps == "all" else parse_numbers(timesteps, "--timesteps"),
        probe__num_steps=num_steps, probe__images=images, probe__per_class=per_class, probe__split=split,
        probe__cells=cells, probe__recommend=recommend, probe__seed=seed, probe__batch=batch,
    )  # fmt: skip
    probe_teacher(config, lora, output or run_folder(dataset) / "probe")

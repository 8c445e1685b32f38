"""`dit-cache probe`."""

from pathlib import Path
from typing import Annotated

import typer

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
    OffloadOption,
    Quantize,
    QuantizeOption,
    ResolutionOption,
    RevisionOption,
    SuperclassOption,
    TeacherOption,
    TrainClassesOption,
    TrainRatioOption,
    open_inputs,
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
    taps: Annotated[str, typer.Option(help="Taps to compare, or all.")] = "all",
    timesteps: Annotated[
        str, typer.Option(help="Timesteps to compare, or all of 1 to --num-steps.")
    ] = "4,7,10,13,16,19,22,25,28",
    num_steps: Annotated[int, typer.Option(help="Length T of the scheduler.")] = 28,
    images: Annotated[int, typer.Option(help="Images to look at, about.")] = 300,
    per_class: Annotated[int, typer.Option(help="Images of each class.")] = 10,
    split: Annotated[
        str, typer.Option(help="Where they come from; choosing on test would be choosing on the test set.")
    ] = "train",
    cells: Annotated[int, typer.Option(help="Features are averaged over N x N places, then flattened.")] = 4,
    recommend: Annotated[int, typer.Option(help="How many timesteps to recommend.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    batch: Annotated[int, typer.Option(help="Images per forward pass.")] = 4,
    conditions: ConditionsOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    resolution: ResolutionOption = None,
    guidance: GuidanceOption = 3.5,
    context: ContextOption = None,
    quantize: QuantizeOption = Quantize.none,
    offload: OffloadOption = False,
    compile_blocks: CompileOption = False,
    limit: LimitOption = None,
    debug: DebugOption = False,
) -> None:
    """Compare taps and timesteps before caching: retrieval, linear separability, high-frequency ratio of each."""
    opened, loaded = open_inputs(
        dataset, data, teacher, revision, lora, dtype, device, resolution, guidance, limit,
        train_classes=train_classes, train_ratio=train_ratio, superclass=superclass, annotations=annotations,
        context=context, quantize=quantize, offload=offload, compile_blocks=compile_blocks,
    )  # fmt: skip
    from pipeline.probe import ProbeConfig
    from pipeline.probe import probe as run_probe

    steps = range(1, num_steps + 1) if timesteps == "all" else parse_numbers(timesteps, "--timesteps")
    config = ProbeConfig(
        taps=() if taps == "all" else parse_names(taps),
        timesteps=tuple(steps),
        num_steps=num_steps,
        images=images,
        per_class=per_class,
        split=split,
        cells=cells,
        recommend=recommend,
        seed=seed,
        batch=batch,
    )
    run_probe(loaded, opened, config, output or run_folder(dataset) / "probe", conditions=conditions)

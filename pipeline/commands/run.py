"""`dit-cache run`."""

import json
from pathlib import Path
from typing import Annotated, cast

import typer

from pipeline.commands.options import (
    AnnotationsOption,
    CompileOption,
    ConditionsOption,
    ContextOption,
    DataOption,
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
)
from pipeline.datasets import dataset_names
from pipeline.presets import run_folder


def run(
    dataset: Annotated[
        str | None, typer.Option(help=f"Data set: {', '.join(dataset_names())}.", show_default="demo")
    ] = None,
    data: DataOption = None,
    train_classes: TrainClassesOption = None,
    train_ratio: TrainRatioOption = None,
    superclass: SuperclassOption = None,
    annotations: AnnotationsOption = None,
    teacher: TeacherOption = None,
    revision: RevisionOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder of everything; default runs/<dataset>.")] = None,
    saved: Annotated[
        Path | None,
        typer.Option("--config", help="Start from a saved configuration, a run.json, instead of the presets."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field, e.g. refine.steps=200; repeatable."),
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Also compare taps and timesteps before the build.")] = False,
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
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove results of another configuration and make them again.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Look for damage in the cache, and build again exactly what is damaged.")
    ] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the configuration and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan, with sizes and hours, and stop; nothing is written.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan of --dry-run as JSON, for scripts.")] = False,
    images_per_second: Annotated[
        float | None,
        typer.Option(min=1e-6, help="For the plan: images per second in a build, all timesteps of a view."),
    ] = None,
    refine_steps_per_second: Annotated[
        float | None, typer.Option(min=1e-6, help="For the plan: speed of Stage I; default estimated from the build's.")
    ] = None,
    annotate_images_per_second: Annotated[
        float | None, typer.Option(min=1e-6, help="For the plan: images per second of detector and captioner.")
    ] = None,
    step: Annotated[str | None, typer.Option(hidden=True, help="Do this step alone: how run starts its steps.")] = None,
    debug: DebugOption = False,
) -> None:
    """From a data set to its cache: annotate, refine, probe if asked for, build, verify; what is done is skipped.

    Presets of the data set and the teacher make one configuration, which
    is printed and saved as run.json. The same command goes on where an
    interrupted one stopped.
    """
    if as_json and not dry_run:
        raise typer.BadParameter("is the form of a plan; add --dry-run", param_hint="--json")
    from dataclasses import replace

    from pipeline.config import STEPS, Step, describe, make_config, render_config

    config = make_config(
        dataset, teacher, settings or (), saved, conditions=conditions,
        data__root=data, data__limit=limit, data__train_classes=parse_classes(train_classes),
        data__train_ratio=train_ratio, data__superclass=superclass, data__annotations=annotations,
        teacher__revision=revision, teacher__resolution=resolution, teacher__guidance=guidance,
        teacher__context=context, teacher__quantize=quantize,
        teacher__offload=offload, teacher__compile=compile_blocks,
        teacher__dtype=dtype, teacher__device=device, annotate__device=device,
    )  # fmt: skip
    if probe:
        config = replace(config, steps=tuple(s for s in STEPS if s in {*config.steps, "probe"}))
    folder = output or run_folder(config.data.name)
    if print_config:
        typer.echo(render_config(config))
        return
    from pipeline.chain import run as chain

    if step is not None:
        from pipeline.chain.process import end_with_standard_input

        end_with_standard_input()
        chain.do_step(config, folder, cast(Step, step), repair=repair)
        return
    from pipeline.chain.forecast import Rates, forecast
    from pipeline.chain.text import forecast_text
    from pipeline.opening import open_data

    opened = open_data(config.data, log=lambda _: None)
    rates = Rates(images_per_second, refine_steps_per_second, annotate_images_per_second)
    plan = forecast(config, folder, opened, rates)  # before anything runs: what does not fit should not wait for hours
    if dry_run:
        typer.echo(json.dumps(plan, indent=2) if as_json else forecast_text(plan))
        return
    typer.echo(f"{describe(config)}\n\n{forecast_text(plan)}\n")
    chain.run_steps(config, folder, opened.samples, overwrite=overwrite, repair=repair, log=typer.echo)

"""`dit-cache run`."""

import json
from pathlib import Path
from typing import Annotated, cast

import typer

from cache_schema.options import Exposed
from cache_schema.settings import Values
from pipeline.commands.options import (
    ANNOTATIONS,
    CONDITIONS,
    FORWARD,
    IMAGES,
    LIMIT,
    TEACHER,
    DebugOption,
    configured_by,
)
from pipeline.config import SETTINGS, STEPS, Step, configure
from pipeline.datasets import dataset_names
from pipeline.presets import run_folder


@configured_by(
    Exposed("data.name", help=f"Data set: {', '.join(dataset_names())}.", shown="demo"),
    *IMAGES, ANNOTATIONS, LIMIT, *TEACHER, CONDITIONS, "teacher.dtype",
    Exposed("teacher.device", also=("annotate.device",)), *FORWARD, "teacher.offload", "teacher.compile",
)  # fmt: skip
def run(
    given: Values,
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

    config = configure(given, settings or (), saved)
    if probe:
        config = replace(config, steps=tuple(s for s in STEPS if s in {*config.steps, "probe"}))
    folder = output or run_folder(config.data.name)
    if print_config:
        typer.echo(SETTINGS.render(config))
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
    typer.echo(f"{SETTINGS.describe(config)}\n\n{forecast_text(plan)}\n")
    chain.run_steps(config, folder, opened.samples, overwrite=overwrite, repair=repair, log=typer.echo)

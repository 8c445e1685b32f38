"""`dit-cache estimate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_schema.options import Exposed
from cache_schema.settings import Values
from pipeline.commands.options import DATASET, FORWARD, LIMIT, PRECISION, TEACHER, DebugOption, configured_by
from pipeline.config import SETTINGS, configure
from pipeline.presets import run_folder

if TYPE_CHECKING:
    from pipeline.config import DataOptions, RunConfig
    from pipeline.datasets.base import Dataset
    from pipeline.teachers import TeacherOutline


@configured_by(
    DATASET, "data.root", LIMIT, *TEACHER,
    "build.taps", "build.timesteps", "build.num_steps", "build.views", "build.crops_scale",
    "build.crops_ratio", "build.feature_splits", "build.store",
    "build.encoding", "build.pool", "build.pca", "build.image_size", "build.image_shape", "build.image_format",
    "build.image_quality",
    Exposed("build.with_images", " /--no-images", help="Leave the student's images out.", shown=""),
    Exposed("build.batch", "--teacher-batch", help="Images a pass of --measure, or auto; the build's --batch."),
    "build.samples_per_shard", "build.massive_channels", "build.massive_factor", *PRECISION, *FORWARD,
)  # fmt: skip
def estimate(
    given: Values,
    lora: Annotated[Path | None, typer.Option(help="LoRA of Stage I; it counts in --measure.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the cache would go; default runs/<dataset>/cache.")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of images, instead of looking at the data set.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows the trainer reads per step, unlabelled ones too.")] = 32,
    steps_per_second: Annotated[float, typer.Option(min=0.001, help="Training steps per second.")] = 10.0,
    trainer_timesteps: Annotated[
        str | None, typer.Option(help="Timesteps the trainer reads; default all of them.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=0.001, help="What the disk or network gives, MB/s; warns if it is too little.")
    ] = None,
    images_per_second: Annotated[
        float | None, typer.Option(min=1e-6, help="Speed of the teacher: images per second, all timesteps of a view.")
    ] = None,
    measure: Annotated[
        int | None, typer.Option(min=1, help="Load the teacher and time it on N images of the data set.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Say what is in memory in each phase, and what does not fit a device of so many GB."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON, for scripts.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what a build would cost before it runs: bytes, read bandwidth, hours. Without --measure, loads no weights."""
    if measure and images_per_second:
        raise typer.BadParameter("give the speed or measure it, not both", param_hint="--measure")
    try:
        trained = None if trainer_timesteps is None else tuple(SETTINGS.accept("build.timesteps", trainer_timesteps))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--trainer-timesteps") from None
    from pipeline.estimate import sizes as work
    from pipeline.estimate.text import estimate_text
    from pipeline.opening import open_teacher, outline_of

    config = configure(given)
    opened = None if images and not measure else _open_dataset(config.data)
    chosen = config.teacher
    outline = outline_of(chosen)
    plan = work.plan_cache(outline, config.build, opened, images)
    rate = None if images_per_second is None else work.TeacherRate(images_per_second, "given")
    demand = work.Demand(batch, steps_per_second, trained, None if bandwidth is None else bandwidth * 1e6)
    place = output or run_folder(config.data.name) / "cache"
    found = work.estimate(plan, demand, place, rate)  # before --measure: a wrong option should not wait for weights
    if measure:
        assert opened is not None
        loaded = open_teacher(chosen, lora, lambda line: typer.echo(line, err=True))
        found = work.estimate(plan, demand, place, work.measure_rate(loaded, opened, config.build, measure))
    if memory is not None:
        found["memory"] = _memory_budget(outline, config, memory)
        found["warnings"] += found["memory"].pop("warnings")
    typer.echo(json.dumps(found, indent=2) if as_json else estimate_text(found))
    for warning in found["warnings"]:
        typer.echo(f"warning: {warning}", err=True)


def _memory_budget(outline: "TeacherOutline", config: "RunConfig", gigabytes: float) -> dict[str, Any]:
    import torch

    from pipeline.device import choose_dtype
    from pipeline.opening import quantization_of
    from pipeline.teachers import quiet_libraries

    quiet_libraries()
    from pipeline.estimate.memory import MemorySettings, memory_budget

    # The device is one that may not be here: unless it is to be a CPU, `auto` is what it is on a GPU.
    target = torch.device("cpu" if config.teacher.device == "cpu" else "cuda")
    settings = MemorySettings(
        dtype=choose_dtype(config.teacher.dtype, target),
        limit=round(gigabytes * 1e9),
        quantization=quantization_of(config.teacher),
        context=config.teacher.context,
        rank=config.refine.rank,
        lora_targets=config.refine.lora_targets,
        refine_batch=config.refine.batch,
    )
    return memory_budget(outline, config.build, settings)


def _open_dataset(options: "DataOptions") -> "Dataset":
    from pipeline.datasets import DataError
    from pipeline.opening import open_data

    try:
        return open_data(options)
    except DataError as error:
        raise DataError(f"{error}; or give --images N to estimate without the data set") from None

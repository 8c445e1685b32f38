"""`dit-cache estimate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.build import (
    EncodingOption,
    FeaturesOption,
    ImageFormatOption,
    ImageQualityOption,
    ImageSizeOption,
    NumStepsOption,
    PcaOption,
    PoolOption,
    StoreOption,
    TapsOption,
    TimestepsOption,
    ViewsOption,
)
from pipeline.commands.options import (
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
    TeacherOption,
    parse_batch,
    parse_names,
    parse_numbers,
)
from pipeline.presets import run_folder

if TYPE_CHECKING:
    from pipeline.config import DataOptions, RunConfig
    from pipeline.datasets.base import Dataset
    from pipeline.teachers import TeacherOutline


def estimate(
    dataset: DatasetOption = "demo",
    data: DataOption = None,
    teacher: TeacherOption = None,
    revision: RevisionOption = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA of Stage I; it counts in --measure.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the cache would go; default runs/<dataset>/cache.")] = None,
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    num_steps: NumStepsOption = None,
    views: ViewsOption = None,
    features: FeaturesOption = None,
    store: StoreOption = None,
    encoding: EncodingOption = None,
    pool: PoolOption = None,
    pca: PcaOption = None,
    image_size: ImageSizeOption = None,
    image_format: ImageFormatOption = None,
    image_quality: ImageQualityOption = None,
    no_images: Annotated[bool, typer.Option("--no-images", help="Leave the student's images out.")] = False,
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
    samples_per_shard: Annotated[int | None, typer.Option(min=1, help="Samples in a file of features.")] = None,
    measure: Annotated[
        int | None, typer.Option(min=1, help="Load the teacher and time it on N images of the data set.")
    ] = None,
    teacher_batch: Annotated[
        str | None, typer.Option(help="Images per forward pass of --measure, or auto; the build's --batch.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Say what is in memory in each phase, and what does not fit a device of so many GB."
        ),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    resolution: ResolutionOption = None,
    guidance: GuidanceOption = None,
    context: ContextOption = None,
    quantize: QuantizeOption = None,
    limit: LimitOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON, for scripts.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what a build would cost before it runs: bytes, read bandwidth, hours. Without --measure, loads no weights."""
    if measure and images_per_second:
        raise typer.BadParameter("give the speed or measure it, not both", param_hint="--measure")
    trained = None if trainer_timesteps is None else parse_numbers(trainer_timesteps, "--trainer-timesteps")
    from pipeline.config import make_config
    from pipeline.estimate import sizes as work
    from pipeline.estimate.text import estimate_text
    from pipeline.opening import open_teacher
    from pipeline.teachers import outline_teacher

    config = make_config(
        dataset, teacher,
        data__root=data, data__limit=limit,
        teacher__revision=revision, teacher__resolution=resolution, teacher__guidance=guidance,
        teacher__context=context, teacher__quantize=quantize, teacher__dtype=dtype,
        teacher__device=device,
        build__taps=parse_names(taps), build__timesteps=parse_numbers(timesteps, "--timesteps"),
        build__num_steps=num_steps, build__views=parse_names(views), build__feature_splits=parse_names(features),
        build__store=store, build__encoding=encoding, build__pool=pool, build__pca=pca,
        build__batch=parse_batch(teacher_batch, "--teacher-batch"),
        build__image_size=image_size, build__image_format=image_format, build__image_quality=image_quality,
        build__with_images=False if no_images else None, build__samples_per_shard=samples_per_shard,
    )  # fmt: skip
    opened = None if images and not measure else _open_dataset(config.data)
    chosen = config.teacher
    outline = outline_teacher(chosen.name, revision=chosen.revision, resolution=chosen.resolution)
    plan = work.plan_cache(outline, config.build, opened, images)
    rate = None if images_per_second is None else work.TeacherRate(images_per_second, "given")
    demand = work.Demand(batch, steps_per_second, trained, None if bandwidth is None else bandwidth * 1e6)
    place = output or run_folder(dataset) / "cache"
    found = work.estimate(plan, demand, place, rate)  # before --measure: a wrong option should not wait for weights
    if measure:
        assert opened is not None
        loaded = open_teacher(chosen, lora)
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

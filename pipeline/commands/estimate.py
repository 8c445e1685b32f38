"""`dit-cache estimate`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.build import Encoding, ImageFormat, Store
from pipeline.options import (
    Context,
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
    TeacherOption,
    choose_dtype,
    open_teacher,
    parse_names,
    parse_numbers,
)
from pipeline.presets import preset_for, run_folder

if TYPE_CHECKING:
    from pipeline.build_config import BuildConfig
    from pipeline.datasets.base import Dataset
    from pipeline.teachers import TeacherOutline


def estimate(
    dataset: DatasetOption = "demo",
    data: DataOption = None,
    teacher: TeacherOption = None,
    revision: RevisionOption = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA of Stage I; it counts in --measure.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the cache would go; default runs/<dataset>/cache.")] = None,
    taps: Annotated[
        str, typer.Option(help="Where features are read: hidden, velocity, double.N, single.N.")
    ] = "hidden",
    timesteps: Annotated[str | None, typer.Option(help="Curriculum P; default 10,16,22,28, demo 22,28.")] = None,
    num_steps: Annotated[
        int, typer.Option(help="Length T of the scheduler; 1 is the noisiest step, T the clearest.")
    ] = 28,
    views: Annotated[str | None, typer.Option(help="canonical, hflip or both; each gets features of its own.")] = None,
    features: Annotated[str | None, typer.Option(help="Splits that get features: train, unlabeled, test.")] = None,
    store: Annotated[Store, typer.Option(help="Zarr v3 arrays, or WebDataset tar files.")] = Store.zarr,
    encoding: Annotated[Encoding, typer.Option(help="How features are stored; all are shown.")] = Encoding.int8,
    pool: Annotated[int, typer.Option(min=1, max=64, help="Mean over N × N tokens.")] = 1,
    pca: Annotated[int | None, typer.Option(min=1, help="Keep the N strongest principal components.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the student's images.")] = None,
    image_format: Annotated[ImageFormat | None, typer.Option(help="File format of the student's images.")] = None,
    image_quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of the student's images.")] = 95,
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
        int | None, typer.Option(min=1, help="Images per forward pass of --measure; the build's --batch.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Say what is in memory in each phase, and what does not fit a device of so many GB."
        ),
    ] = None,
    quantize: QuantizeOption = Quantize.none,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    resolution: ResolutionOption = None,
    guidance: GuidanceOption = 3.5,
    context: ContextOption = None,
    limit: LimitOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON, for scripts.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what a build would cost before it runs: bytes, read bandwidth, hours. Without --measure, loads no weights."""
    preset = preset_for(dataset)
    if measure and images_per_second:
        raise typer.BadParameter("give the speed or measure it, not both", param_hint="--measure")
    trained = None if trainer_timesteps is None else parse_numbers(trainer_timesteps, "--trainer-timesteps")
    from pipeline import estimate as work
    from pipeline.build_config import BuildConfig
    from pipeline.estimate_text import estimate_text
    from pipeline.teachers import outline_teacher

    config = BuildConfig(
        taps=parse_names(taps),
        timesteps=preset.timesteps if timesteps is None else parse_numbers(timesteps, "--timesteps"),
        num_steps=num_steps,
        views=preset.views if views is None else parse_names(views),
        feature_splits=preset.feature_splits if features is None else parse_names(features),
        store=store.value,
        encoding=encoding.value,
        pool=pool,
        pca=pca,
        batch=preset.batch if teacher_batch is None else teacher_batch,
        image_size=preset.image_size if image_size is None else image_size,
        image_format=(ImageFormat(preset.image_format) if image_format is None else image_format).value,
        image_quality=image_quality,
        with_images=not no_images,
        samples_per_shard=samples_per_shard,
    )
    opened = None if images and not measure else _open_dataset(dataset, data, limit)
    outline = outline_teacher(teacher or preset.teacher, revision=revision, resolution=resolution)
    plan = work.plan_cache(outline, config, opened, images)
    rate = None if images_per_second is None else work.TeacherRate(images_per_second, "given")
    demand = work.Demand(batch, steps_per_second, trained, None if bandwidth is None else bandwidth * 1e6)
    place = output or run_folder(dataset) / "cache"
    found = work.estimate(plan, demand, place, rate)  # before --measure: a wrong option should not wait for weights
    if measure:
        assert opened is not None
        loaded = open_teacher(
            dataset, teacher, revision, lora, dtype, device, resolution, guidance, context, quantize=quantize
        )
        found = work.estimate(plan, demand, place, work.measure_rate(loaded, opened, config, measure))
    if memory is not None:
        found["memory"] = _memory_budget(outline, config, memory, quantize, preset.refine_batch, dtype, device, context)
        found["warnings"] += found["memory"].pop("warnings")
    typer.echo(json.dumps(found, indent=2) if as_json else estimate_text(found))
    for warning in found["warnings"]:
        typer.echo(f"warning: {warning}", err=True)


def _memory_budget(
    outline: "TeacherOutline", config: "BuildConfig", gigabytes: float, quantize: Quantize, refine_batch: int,
    dtype: Dtype, device: str, context: Context | None,
) -> dict[str, Any]:  # fmt: skip
    import torch

    from pipeline.teachers import quiet_libraries

    quiet_libraries()
    from pipeline.memory import MemorySettings, memory_budget

    # The device is one that may not be here: unless it is to be a CPU, `auto` is what it is on a GPU.
    target = torch.device("cpu" if device == "cpu" else "cuda")
    settings = MemorySettings(
        dtype=choose_dtype(dtype, target),
        limit=round(gigabytes * 1e9),
        quantization=quantize.kind,
        context=context.value if context else None,
        refine_batch=refine_batch,
    )
    return memory_budget(outline, config, settings)


def _open_dataset(name: str, root: Path | None, limit: int | None) -> "Dataset":
    from pipeline.datasets import DataError, open_dataset

    try:
        return open_dataset(name, root, limit)
    except DataError as error:
        raise DataError(f"{error}; or give --images N to estimate without the data set") from None

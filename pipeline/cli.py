"""`dit-cache`: the heavy job. Model libraries are imported inside the commands, so that `--help` answers at once."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_schema.cli import run
from cache_schema.errors import DitDistillError
from pipeline.presets import preset_for, run_folder

if TYPE_CHECKING:
    from pipeline.datasets.base import Dataset
    from pipeline.teachers.base import Teacher

app = typer.Typer(
    name="dit-cache",
    help="Run a frozen diffusion transformer once per image and timestep, and share what it saw.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Encoding(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Compression(StrEnum):
    none = "none"
    zstd = "zstd"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ImageFormat(StrEnum):
    jpeg = "jpeg"
    png = "png"


class Text(StrEnum):
    caption = "caption"
    none = "none"


DatasetOption = Annotated[str, typer.Option("--dataset", help="Data set: demo (built in) or cars.")]
DataOption = Annotated[Path | None, typer.Option("--data", help="Directory of the data set; default data/<dataset>.")]
TeacherOption = Annotated[
    str | None,
    typer.Option("--teacher", help="Preset (demo, flux-dev, flux-kontext), diffusers folder, or hub repository."),
]
RevisionOption = Annotated[str | None, typer.Option(help="Revision of the hub repository.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Precision of the teacher; auto is bfloat16 on a GPU, float32 on a CPU.")
]
DeviceOption = Annotated[str, typer.Option(help="Where the teacher runs; auto takes the GPU if there is one.")]
ResolutionOption = Annotated[
    int | None, typer.Option(help="Side of the teacher's views in pixels; default from the preset.")
]
GuidanceOption = Annotated[float, typer.Option(help="Guidance, for teachers whose configuration embeds it.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use only the first N images of each split, to try.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


@app.callback()
def options(debug: DebugOption = False) -> None:
    """Run a frozen diffusion transformer once per image and timestep, and share what it saw."""


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers like 10,16,22,28", param_hint=option
        ) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _open(
    dataset: str, data: Path | None, teacher: str | None, revision: str | None, lora: Path | None, dtype: Dtype,
    device: str, resolution: int | None, guidance: float, limit: int | None,
) -> "tuple[Dataset, Teacher]":  # fmt: skip
    # The data set first: a wrong path should not wait for 24 GB of weights.
    from pipeline.datasets import open_dataset

    opened = open_dataset(dataset, data, limit)
    import torch

    from pipeline.teachers import load_teacher

    try:
        target = torch.device(
            "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        )
    except RuntimeError:
        raise DitDistillError(f"--device {device}: not a device; use auto, cpu or cuda") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DitDistillError(f"--device {device}: this machine has no CUDA GPU that PyTorch can use")
    auto = torch.bfloat16 if target.type == "cuda" else torch.float32
    chosen = load_teacher(
        teacher or preset_for(dataset).teacher,
        revision=revision,
        lora=lora,
        resolution=resolution,
        dtype=auto if dtype is Dtype.auto else getattr(torch, dtype.value),
        device=str(target),
        guidance=guidance,
    )
    return opened, chosen


@app.command()
def refine(
    dataset: DatasetOption = "demo",
    data: DataOption = None,
    teacher: TeacherOption = None,
    revision: RevisionOption = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the LoRA; default runs/<dataset>/lora.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; default 30000, demo 200.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step; default 1, demo 8.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of Adam; default 1e-4.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA.")] = 16,
    validation_images: Annotated[int, typer.Option(help="Training images held out to measure progress.")] = 32,
    validate_every: Annotated[int, typer.Option(help="Steps between measurements on held-out images.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, order and noise.")] = 0,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    resolution: ResolutionOption = None,
    guidance: GuidanceOption = 3.5,
    limit: LimitOption = None,
    debug: DebugOption = False,
) -> None:
    """Stage I: refine the frozen DiT with a LoRA so that it uses the context image (condition difference refining)."""
    preset = preset_for(dataset)
    opened, loaded = _open(dataset, data, teacher, revision, None, dtype, device, resolution, guidance, limit)
    from pipeline.refine import RefineConfig
    from pipeline.refine import refine as run_refine

    config = RefineConfig(
        steps=preset.refine_steps if steps is None else steps,
        batch=preset.refine_batch if batch is None else batch,
        lr=preset.refine_lr if lr is None else lr,
        rank=rank,
        seed=seed,
        validation_images=validation_images,
        validate_every=validate_every,
    )
    run_refine(loaded, opened, config, output or run_folder(dataset) / "lora")


@app.command()
def build(
    dataset: DatasetOption = "demo",
    data: DataOption = None,
    teacher: TeacherOption = None,
    revision: RevisionOption = None,
    lora: Annotated[
        Path | None,
        typer.Option(help="LoRA of Stage I (folder or file); without it the original DiT is cached."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the cache; default runs/<dataset>/cache.")] = None,
    taps: Annotated[
        str, typer.Option(help="Where features are read: hidden, velocity, double.N, single.N.")
    ] = "hidden",
    timesteps: Annotated[str | None, typer.Option(help="Curriculum P; default 10,16,22,28, demo 22,28.")] = None,
    num_steps: Annotated[
        int, typer.Option(help="Length T of the scheduler; 1 is the noisiest step, T the clearest.")
    ] = 28,
    views: Annotated[str | None, typer.Option(help="canonical, hflip or both; each gets features of its own.")] = None,
    features: Annotated[str | None, typer.Option(help="Splits that get features: train, unlabeled, test.")] = None,
    encoding: Annotated[Encoding, typer.Option(help="How features are stored.")] = Encoding.int8,
    compression: Annotated[
        Compression, typer.Option(help="Lossless compression of the stored bytes.")
    ] = Compression.none,
    text: Annotated[Text, typer.Option(help="Condition on captions, or on an empty prompt.")] = Text.caption,
    seed: Annotated[int, typer.Option(help="Seed of the noise; one noise per image and view.")] = 0,
    batch: Annotated[int | None, typer.Option(help="Images per forward pass (times the timesteps).")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the student's images; default 224, demo 96.")] = None,
    image_format: Annotated[ImageFormat | None, typer.Option(help="File format of the student's images.")] = None,
    image_quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of the student's images.")] = 95,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Store the student's images.")] = True,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Default: about 64 MB, at most 512 samples.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    resolution: ResolutionOption = None,
    guidance: GuidanceOption = 3.5,
    limit: LimitOption = None,
    debug: DebugOption = False,
) -> None:
    """Build the cache, or resume it: a shard that is there is not computed again."""
    preset = preset_for(dataset)
    chosen_steps = preset.timesteps if timesteps is None else _numbers(timesteps, "--timesteps")
    opened, loaded = _open(dataset, data, teacher, revision, lora, dtype, device, resolution, guidance, limit)
    from pipeline.build import BuildConfig
    from pipeline.build import build as run_build

    config = BuildConfig(
        taps=_names(taps),
        timesteps=chosen_steps,
        num_steps=num_steps,
        views=preset.views if views is None else _names(views),
        feature_splits=preset.feature_splits if features is None else _names(features),
        encoding=encoding.value,
        compression=compression.value,
        seed=seed,
        text=text.value,
        batch=preset.batch if batch is None else batch,
        image_size=preset.image_size if image_size is None else image_size,
        image_format=(ImageFormat(preset.image_format) if image_format is None else image_format).value,
        image_quality=image_quality,
        with_images=images,
        samples_per_shard=samples_per_shard,
    )
    run_build(loaded, opened, config, output or run_folder(dataset) / "cache")


@app.command()
def info(
    cache: Annotated[Path, typer.Argument(help="A cache, sealed or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the description as JSON, for scripts.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what a cache holds, who built it with what, and how faithful its features are."""
    from cache_schema.describe import describe, describe_text

    if as_json:
        import json

        typer.echo(json.dumps(describe(cache), indent=2))
    else:
        typer.echo(describe_text(cache))


@app.command()
def verify(
    cache: Annotated[Path, typer.Argument(help="A cache, sealed or not.")],
    debug: DebugOption = False,
) -> None:
    """Check every file against the checksums in the journal; exit code 1 if anything is wrong."""
    from cache_schema.verify import verify as check

    problems = check(cache)
    for problem in problems:
        typer.echo(str(problem))
    if problems:
        raise DitDistillError(f"{len(problems)} problems in {cache}; build again into an empty folder")
    typer.echo(f"{cache}: every file is as it was written")


def main() -> None:
    """Entry point of `dit-cache`."""
    run(app, name="dit-cache")

"""`dit-cache build`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.options import (
    DataOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    GuidanceOption,
    LimitOption,
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
from pipeline.presets import preset_for, run_folder


class Encoding(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Compression(StrEnum):
    none = "none"
    zstd = "zstd"


class ImageFormat(StrEnum):
    jpeg = "jpeg"
    png = "png"


class Text(StrEnum):
    caption = "caption"
    none = "none"


def build(
    dataset: DatasetOption = "demo",
    data: DataOption = None,
    train_classes: TrainClassesOption = None,
    train_ratio: TrainRatioOption = None,
    superclass: SuperclassOption = None,
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
    chosen_steps = preset.timesteps if timesteps is None else parse_numbers(timesteps, "--timesteps")
    opened, loaded = open_inputs(
        dataset, data, teacher, revision, lora, dtype, device, resolution, guidance, limit,
        train_classes=train_classes, train_ratio=train_ratio, superclass=superclass,
    )  # fmt: skip
    from pipeline.build import BuildConfig
    from pipeline.build import build as run_build

    config = BuildConfig(
        taps=parse_names(taps),
        timesteps=chosen_steps,
        num_steps=num_steps,
        views=preset.views if views is None else parse_names(views),
        feature_splits=preset.feature_splits if features is None else parse_names(features),
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

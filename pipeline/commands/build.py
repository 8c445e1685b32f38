"""`dit-cache build`."""

from enum import StrEnum
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
    open_data,
    open_teacher,
    parse_names,
    parse_numbers,
    parse_share,
)
from pipeline.presets import preset_for, run_folder


class Encoding(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"
    float8_e4m3 = "float8_e4m3"


class Compression(StrEnum):
    none = "none"
    zstd = "zstd"
    blosc_lz4 = "blosc:lz4"
    blosc_zstd = "blosc:zstd"


class Store(StrEnum):
    zarr = "zarr"
    webdataset = "webdataset"


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
    annotations: AnnotationsOption = None,
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
    store: Annotated[Store, typer.Option(help="Zarr v3 arrays, or WebDataset tar files.")] = Store.zarr,
    encoding: Annotated[Encoding, typer.Option(help="Number format in which features are stored.")] = Encoding.int8,
    pool: Annotated[int, typer.Option(min=1, help="Store the mean over N x N tokens.")] = 1,
    pca: Annotated[int | None, typer.Option(min=1, help="Store the K strongest principal components.")] = None,
    compression: Annotated[
        Compression, typer.Option(help="Lossless compression of the stored bytes.")
    ] = Compression.none,
    min_cosine: Annotated[
        float | None, typer.Option(help="Refuse a cache whose mean cosine to the teacher is below this, e.g. 0.995.")
    ] = None,
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
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad image, caption or feature.")] = False,
    max_bad: Annotated[str, typer.Option(help="Stop above this share of bad samples: 1% or 0.01.")] = "1%",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a begun cache, and fail if there is none; without it, do either.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check the cache first, and build again exactly what is damaged.")
    ] = False,
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
    """Build the cache, or resume it: a shard that is there is not computed again."""
    preset = preset_for(dataset)
    place = output or run_folder(dataset) / "cache"
    bad_share = parse_share(max_bad, "--max-bad")
    chosen_steps = preset.timesteps if timesteps is None else parse_numbers(timesteps, "--timesteps")
    if resume or repair:
        _check_begun(place, "--repair" if repair else "--resume")
    from pipeline.build import build as run_build
    from pipeline.build import scan_for
    from pipeline.build_config import BuildConfig
    from pipeline.tolerance import Tolerance

    config = BuildConfig(
        taps=parse_names(taps),
        timesteps=chosen_steps,
        num_steps=num_steps,
        views=preset.views if views is None else parse_names(views),
        feature_splits=preset.feature_splits if features is None else parse_names(features),
        store=store.value,
        encoding=encoding.value,
        pool=pool,
        pca=pca,
        compression=compression.value,
        min_cosine=min_cosine,
        seed=seed,
        text=text.value,
        batch=preset.batch if batch is None else batch,
        image_size=preset.image_size if image_size is None else image_size,
        image_format=(ImageFormat(preset.image_format) if image_format is None else image_format).value,
        image_quality=image_quality,
        with_images=images,
        samples_per_shard=samples_per_shard,
    )
    opened = open_data(
        dataset, data, limit,
        train_classes=train_classes, train_ratio=train_ratio, superclass=superclass, annotations=annotations,
    )  # fmt: skip
    tolerance = Tolerance(max_bad=bad_share, strict=strict)
    # Before the teacher: a broken image should not wait for 24 GB of weights.
    scanned = scan_for(opened, config, tolerance)
    loaded = open_teacher(
        dataset, teacher, revision, lora, dtype, device, resolution, guidance, context,
        quantize=quantize, offload=offload, compile_blocks=compile_blocks,
    )  # fmt: skip
    run_build(loaded, opened, config, place, tolerance=tolerance, scanned=scanned, repair=repair, conditions=conditions)


def _check_begun(cache: Path, option: str) -> None:
    """Raise unless there is a cache to continue, as the option demands."""
    from cache_schema.errors import CacheNotFound
    from cache_schema.manifest_file import load_manifest

    try:
        load_manifest(cache)
    except CacheNotFound:
        raise CacheNotFound(f"{option}: there is no cache at {cache}; leave {option} out to begin one") from None

"""`dit-cache build`."""

from enum import StrEnum
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
    parse_batch,
    parse_classes,
    parse_names,
    parse_numbers,
    parse_share,
)
from pipeline.presets import run_folder


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


TapsOption = Annotated[
    str | None,
    typer.Option(help="Where features are read: hidden, velocity, double.N, single.N.", show_default="hidden"),
]
TimestepsOption = Annotated[str | None, typer.Option(help="Curriculum P; default 10,16,22,28, demo 22,28.")]
NumStepsOption = Annotated[
    int | None,
    typer.Option(help="Length T of the scheduler; 1 is the noisiest step, T the clearest.", show_default="28"),
]
ViewsOption = Annotated[str | None, typer.Option(help="canonical, hflip or both; each gets features of its own.")]
FeaturesOption = Annotated[str | None, typer.Option(help="Splits that get features: train, unlabeled, test.")]
StoreOption = Annotated[
    Store | None, typer.Option(help="Zarr v3 arrays, or WebDataset tar files.", show_default="zarr")
]
EncodingOption = Annotated[
    Encoding | None, typer.Option(help="Number format in which features are stored.", show_default="int8")
]
PoolOption = Annotated[
    int | None, typer.Option(min=1, max=64, help="Store the mean over N × N tokens; default 1, nabirds 2.")
]
PcaOption = Annotated[int | None, typer.Option(min=1, help="Store the K strongest principal components.")]
ImageSizeOption = Annotated[int | None, typer.Option(help="Side of the student's images; default 224, demo 96.")]
ImageFormatOption = Annotated[ImageFormat | None, typer.Option(help="File format of the student's images.")]
ImageQualityOption = Annotated[
    int | None, typer.Option(min=1, max=100, help="JPEG quality of the student's images.", show_default="95")
]


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
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    num_steps: NumStepsOption = None,
    views: ViewsOption = None,
    features: FeaturesOption = None,
    store: StoreOption = None,
    encoding: EncodingOption = None,
    pool: PoolOption = None,
    pca: PcaOption = None,
    compression: Annotated[
        Compression | None, typer.Option(help="Lossless compression of the stored bytes.", show_default="none")
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="Refuse a cache whose mean cosine to the teacher is below this, e.g. 0.995.")
    ] = None,
    text: Annotated[
        Text | None, typer.Option(help="Condition on captions, or on an empty prompt.", show_default="caption")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the noise; one noise per image and view.", show_default="0")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="Images per forward pass, each at all timesteps; auto: 32, halved when memory runs out."),
    ] = None,
    image_size: ImageSizeOption = None,
    image_format: ImageFormatOption = None,
    image_quality: ImageQualityOption = None,
    images: Annotated[
        bool | None,
        typer.Option("--images/--no-images", help="Store the student's images.", show_default="images"),
    ] = None,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Default: about 64 MB, at most 512 samples.")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict", help="Stop at the first bad image, caption or feature.")
    ] = None,
    max_bad: Annotated[
        str | None, typer.Option(help="Stop above this share of bad samples: 1% or 0.01.", show_default="1%")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a begun cache, and fail if there is none; without it, do either.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check the cache first, and build again exactly what is damaged.")
    ] = False,
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
    """Build the cache, or resume it: a shard that is there is not computed again."""
    place = output or run_folder(dataset) / "cache"
    chosen_steps = parse_numbers(timesteps, "--timesteps")
    bad_share = parse_share(max_bad, "--max-bad")
    if resume or repair:
        _check_begun(place, "--repair" if repair else "--resume")
    from pipeline.chain.steps import build_cache
    from pipeline.config import make_config

    config = make_config(
        dataset, teacher, conditions=conditions,
        data__root=data, data__limit=limit, data__train_classes=parse_classes(train_classes),
        data__train_ratio=train_ratio, data__superclass=superclass, data__annotations=annotations,
        teacher__revision=revision, teacher__resolution=resolution, teacher__guidance=guidance,
        teacher__context=context, teacher__quantize=quantize,
        teacher__offload=offload, teacher__compile=compile_blocks, teacher__dtype=dtype, teacher__device=device,
        build__taps=parse_names(taps), build__timesteps=chosen_steps, build__num_steps=num_steps,
        build__views=parse_names(views), build__feature_splits=parse_names(features),
        build__store=store, build__encoding=encoding, build__pool=pool, build__pca=pca,
        build__compression=compression, build__min_cosine=min_cosine, build__seed=seed, build__text=text,
        build__batch=parse_batch(batch, "--batch"), build__image_size=image_size, build__image_format=image_format,
        build__image_quality=image_quality, build__with_images=images, build__samples_per_shard=samples_per_shard,
        tolerance__max_bad=bad_share, tolerance__strict=strict,
    )  # fmt: skip
    build_cache(config, lora, place, repair=repair)


def _check_begun(cache: Path, option: str) -> None:
    """Raise unless there is a cache to continue, as the option demands."""
    from cache_schema.errors import CacheNotFound
    from cache_schema.format.manifest_file import load_manifest
    from cache_schema.storage.local import LocalFolder

    try:
        load_manifest(LocalFolder(cache))
    except CacheNotFound:
        raise CacheNotFound(f"{option}: there is no cache at {cache}; leave {option} out to begin one") from None

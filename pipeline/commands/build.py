"""`dit-cache build`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cache_schema.settings import Values
from pipeline.commands.options import (
    ANNOTATIONS,
    CONDITIONS,
    DATASET,
    FORWARD,
    IMAGES,
    LIMIT,
    PRECISION,
    TEACHER,
    DebugOption,
    configured_by,
)
from pipeline.config import RunConfig, configure
from pipeline.presets import run_folder

if TYPE_CHECKING:
    from pipeline.build.part import Part
    from pipeline.chain.steps import Elsewhere


@configured_by(
    DATASET, *IMAGES, ANNOTATIONS, LIMIT, *TEACHER,
    "build.taps", "build.timesteps", "build.num_steps", "build.views", "build.crops_scale",
    "build.crops_ratio", "build.feature_splits", "build.store",
    "build.encoding", "build.pool", "build.pca", "build.compression", "build.min_cosine", "build.text", "build.seed",
    "build.batch", "build.batch_timeout", "build.image_size", "build.image_shape", "build.image_format",
    "build.image_quality", "build.with_images", "build.samples_per_shard", "build.massive_channels",
    "build.massive_factor",
    "tolerance.strict", "tolerance.max_bad", CONDITIONS, *PRECISION, *FORWARD,
    "teacher.offload", "teacher.compile",
)  # fmt: skip
def build(
    given: Values,
    lora: Annotated[
        Path | None,
        typer.Option(help="LoRA of Stage I (folder or file); without it the original DiT is cached."),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the cache, or where it is built at s3, gs, az or sftp; default runs/<dataset>/cache.",
        ),
    ] = None,
    spool: Annotated[
        Path | None,
        typer.Option(help="With an --output elsewhere: folder for what is under way; default below ~/.cache."),
    ] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="With an --output elsewhere: replace a builder that was given up.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a begun cache, and fail if there is none; without it, do either.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check the cache first, and build again exactly what is damaged.")
    ] = False,
    shard_slice: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Build every N-th shard from the I-th on, I from 0: one job of an array."),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Compute here, or in workers that Ray starts (extra ray).")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="With --engine ray: a running cluster, host:port or auto; default one made here.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="With --engine ray: how many workers; default 1.")] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(min=0, help="With --engine ray: GPUs of each worker; 0 computes on CPUs; default 1."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            envvar="SLURM_JOB_END_TIME",
            help="Begin no shard that cannot be finished by then (02:30, 2026-11-26T02:30, seconds since 1970); exit "
            "code 75 says that some are left and the command is to be run again.",
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Build the cache, or resume it: a shard that is there is not computed again."""
    from cache_schema.storage.places import is_remote
    from pipeline.build.part import Deadline, Part, read_slice, read_time

    part = Part(
        None if shard_slice is None else read_slice(shard_slice),
        None if until is None else Deadline(read_time(until)),
    )
    if engine == "ray" and (repair or part.shards is not None):
        raise typer.BadParameter("leave --repair and --shard-slice to the local engine", param_hint="--engine ray")
    if engine != "ray" and (workers, gpus_per_worker, address) != (None, None, None):
        raise typer.BadParameter("are of --engine ray", param_hint="--workers, --gpus-per-worker, --address")
    cluster = (workers, gpus_per_worker, address) if engine == "ray" else None
    if output is not None and is_remote(output):
        if repair or resume:
            raise typer.BadParameter("leave --repair and --resume to folders", param_hint="--output")
        _elsewhere(configure(given), lora, output, spool, part, take_over, cluster)
        return
    if spool is not None or take_over:
        raise typer.BadParameter("are for an --output elsewhere", param_hint="--spool, --take-over")
    place = run_folder(given["data.name"]) / "cache" if output is None else Path(output)
    if resume or repair:
        _check_begun(place, "--repair" if repair else "--resume")
    if cluster is not None:
        _with_ray(configure(given), lora, place, part, cluster)
        return
    from pipeline.chain.steps import build_cache

    build_cache(configure(given), lora, place, repair=repair, part=part)


_Workers = tuple[int | None, float | None, str | None]  # how many, GPUs of each, the cluster's address


def _elsewhere(
    config: RunConfig,
    lora: Path | None,
    url: str,
    spool: Path | None,
    part: "Part",
    take_over: bool,
    cluster: _Workers | None,
) -> None:
    from cache_schema.sharing.spool import default_spool
    from pipeline.chain.steps import Elsewhere, build_cache

    elsewhere = Elsewhere(url.rstrip("/"), take_over)
    here = spool or default_spool(f"{elsewhere.url} {part.shards}")
    if cluster is not None:
        _with_ray(config, lora, here, part, cluster, elsewhere, spool)
    else:
        build_cache(config, lora, here, part=part, elsewhere=elsewhere)


def _with_ray(
    config: RunConfig,
    lora: Path | None,
    output: Path,
    part: "Part",
    asked: _Workers,
    elsewhere: "Elsewhere | None" = None,
    spool: Path | None = None,
) -> None:
    from pipeline.build.engines.ray_engine import Cluster
    from pipeline.chain.steps import build_cache_with_ray

    workers, gpus, address = asked
    cluster = Cluster(1 if workers is None else workers, 1.0 if gpus is None else gpus, address)
    until = None if part.deadline is None else part.deadline.end
    build_cache_with_ray(config, lora, output, cluster, until, elsewhere=elsewhere, spool=spool)


def _check_begun(cache: Path, option: str) -> None:
    """Raise unless there is a cache to continue, as the option demands."""
    from cache_schema.errors import CacheNotFound
    from cache_schema.format.manifest_file import load_manifest
    from cache_schema.storage.local import LocalFolder

    try:
        load_manifest(LocalFolder(cache))
    except CacheNotFound:
        raise CacheNotFound(f"{option}: there is no cache at {cache}; leave {option} out to begin one") from None

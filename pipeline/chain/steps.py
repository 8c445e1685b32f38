"""The steps from a data set to its cache, one function each: it opens what the configuration names and does the work.

Every step goes on where it was interrupted, leaves a finished result as it is, and refuses one that other settings
made. What is cheap to know comes first: whether there is such a teacher, then the data set, which is scanned where it
needs to be, before 24 GB of weights are loaded. Model libraries are imported by the step that needs them. A step that
is a command of its own (`alone`) ends with where its result is and what comes next.
"""

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cache_schema.advice import advised
from cache_schema.errors import DitDistillError
from pipeline.chain.agreement import check_train_guidance, planned, remarks_on, remarks_on_stage_one
from pipeline.chain.next_step import next_line
from pipeline.config import RunConfig
from pipeline.opening import check_teacher, open_data, open_teacher
from pipeline.teachers.base import Teacher, is_image_encoder
from pipeline.watchdog import known_hangs, under_watch

if TYPE_CHECKING:
    from cache_schema.sharing.spool import SpooledFolder
    from pipeline.build.engines.ray_engine import Cluster
    from pipeline.build.part import Part


@dataclass(frozen=True)
class Elsewhere:
    """A place on another machine that a cache is built into. take_over: of a builder there that was given up."""

    url: str
    take_over: bool = False

    def folder(self, spool: Path, part: "Part") -> "SpooledFolder":
        """The folder to build the part in, by way of a folder here."""
        from cache_schema.sharing.spool import spooled_folder
        from pipeline.build.part import ShardSlice

        index, count = (part.shards.index, part.shards.count) if isinstance(part.shards, ShardSlice) else (0, 1)
        return spooled_folder(self.url, spool, index, count, self.take_over)


def annotate_images(
    config: RunConfig, output: Path, *, sheet: Path | None = None, sheet_images: int = 24, alone: bool = True
) -> None:
    """Boxes and captions of every image into the Parquet file `output`; sheet: a picture of some of them."""
    from pipeline.annotate.run import annotate
    from pipeline.annotate.sheet import draw_sheet
    from pipeline.device import choose_device

    opened = open_data(config.data)
    choose_device(config.annotate.device)
    rows = annotate(opened, config.annotate, output)
    if sheet is not None:
        draw_sheet(opened, rows, sheet_images, sheet)
        print(f"wrote {sheet}")
    if alone:
        print(next_line("annotate", config, output))


def refine_teacher(config: RunConfig, output: Path, *, alone: bool = True) -> None:
    """Stage I: a LoRA into the folder `output`. Raises for a way to hold the teacher in which it cannot be trained."""
    if config.teacher.compile and config.teacher.quantize != "none":
        raise DitDistillError(
            "--compile: PyTorch cannot compile gradients through weights of 8 bits; leave out --compile or --quantize"
        )
    check_teacher(config.teacher)
    opened = open_data(config.data)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one says so
    guidance = config.teacher.guidance if config.refine.train_guidance is None else config.refine.train_guidance
    loaded = open_teacher(replace(config.teacher, offload=False, guidance=guidance), lora=None)
    if is_image_encoder(loaded):
        raise DitDistillError(
            f"teacher {loaded.source}: an image encoder has no Stage I; go on with dit-cache build, or leave refine "
            "out of the steps: --set steps=build,verify"
        )
    check_train_guidance(config, loaded)
    for remark in remarks_on_stage_one(loaded) if first else ():
        print(remark)
    from pipeline.estimate.activations import recomputes
    from pipeline.refine import refine
    from pipeline.teachers.diffusers_teacher import DiffusersTeacher

    def decide() -> bool:
        return recomputes(cast(DiffusersTeacher, loaded), config.refine, print if first else lambda _: None)

    refine(
        cast(Teacher, loaded), opened, config.refine, output, conditions=config.conditions, recomputes=decide
    )  # fmt: skip
    if alone and first:
        print(next_line("refine", config, output))


def probe_teacher(config: RunConfig, lora: Path | None, output: Path, *, alone: bool = True) -> None:
    """Which taps and timesteps tell most: table and heat map into the folder `output`."""
    check_teacher(config.teacher, lora)
    opened = open_data(config.data)
    loaded = open_teacher(config.teacher, lora)
    for remark in remarks_on(loaded, lora, config.probe.num_steps, config.teacher):
        print(remark)
    from pipeline.probe.run import Usual, probe

    usual = Usual(config.build.taps, config.build.timesteps, config.build.massive_channels)
    probe(loaded, opened, config.probe, output, conditions=config.conditions, usual=usual)
    if alone:
        print(next_line("probe", config, output, lora))


def build_cache(
    config: RunConfig,
    lora: Path | None,
    output: Path,
    *,
    repair: bool = False,
    alone: bool = True,
    part: "Part | None" = None,
    elsewhere: "Elsewhere | None" = None,
) -> None:
    """The cache into the folder `output`, or by way of it to `elsewhere`.

    repair: look for damage first, and build again exactly what is damaged. part: which shards are built here and until
    when; None is all of them.
    """
    if config.build.batch_timeout is not None:
        # Before anything is imported or begun: from here on it is a child that works.
        under_watch(config.build.batch_timeout, output)
    from pipeline.build.part import WHOLE
    from pipeline.build.run import build, scan_for
    from pipeline.inputs.decoded import DecodedImages

    check_teacher(config.teacher, lora, config.build.taps)
    opened = DecodedImages(open_data(config.data))
    scanned = scan_for(opened, config.build, config.tolerance, hung=known_hangs(output, "scan"))
    loaded = open_teacher(config.teacher, lora)
    for remark in remarks_on(loaded, lora, config.build.num_steps, config.teacher):
        print(remark)
    part = part or WHOLE
    built = build(
        loaded, opened, config.build, output,
        tolerance=config.tolerance, scanned=scanned, repair=repair, conditions=config.conditions, part=part,
        elsewhere=None if elsewhere is None else elsewhere.folder(output, part),
    )  # fmt: skip
    if elsewhere is not None and built.sealed:
        print(_built_there(elsewhere.url))
    elif alone and built.sealed:
        print(next_line("build", config, output))


def build_cache_with_ray(
    config: RunConfig,
    lora: Path | None,
    output: Path,
    cluster: "Cluster",
    until: float | None = None,
    *,
    elsewhere: "Elsewhere | None" = None,
    spool: Path | None = None,
) -> None:
    """The cache into the folder `output`, or by way of it to `elsewhere`, its shards computed by workers of Ray.

    Each has a teacher of its own. until: seconds since 1970 by which to have stopped. spool: beside which each worker
    has what it is at, of a cache elsewhere.
    """
    if config.build.batch_timeout is not None:
        # The scan is the driver's own; workers are watched by it.
        under_watch(config.build.batch_timeout, output)
    from pipeline.build.engines.ray_engine import sealed_after, the_library
    from pipeline.build.engines.ray_worker import Place, Work
    from pipeline.build.part import WHOLE
    from pipeline.build.run import scan_for
    from pipeline.inputs.condition_store import default_store

    the_library()
    for remark in remarks_on(planned(config.teacher), lora, config.build.num_steps, config.teacher):
        print(remark)
    # Workers have working directories of their own.
    data = replace(config.data, root=config.data.root and config.data.root.absolute())
    scanned = scan_for(open_data(data), config.build, config.tolerance, hung=known_hangs(output, "scan"))
    folder = None if elsewhere is None else elsewhere.folder(output.absolute(), WHOLE)
    conditions = config.conditions if folder is not None else config.conditions or default_store(output)
    work = Work(
        open_teacher=partial(open_teacher, config.teacher, lora and lora.absolute()),
        open_dataset=partial(open_data, data, _say_nothing),
        config=config.build,
        output=output.absolute(),
        conditions=conditions and conditions.absolute(),
        tolerance=config.tolerance,
        scanned=scanned,
        until=until,
        elsewhere=None if folder is None else Place(folder.location, folder.token, spool and spool.absolute()),
    )
    sealed_after(work, cluster, folder=folder)
    if elsewhere is not None:
        print(_built_there(elsewhere.url))
    else:
        print(next_line("build", config, output))


def _built_there(url: str) -> str:
    return f"built {url}; next: dit-train run --cache {url}"


def _say_nothing(_line: str) -> None:
    """What is said of a data set was said once."""


def verify_cache(cache: str | Path) -> None:
    """Hold every file of a cache against the checksums in its journal; raises DitDistillError if anything is wrong."""
    from cache_schema import CacheUnsealed, open_cache
    from cache_schema.care.verify import advice, verify

    problems = verify(cache)
    for problem in problems:
        print(problem)
    if problems:
        raise DitDistillError(advice(problems, cache))
    print(f"{cache}: every file is as it was written")
    try:
        open_cache(cache, local_cache="0")  # to know, not to read: nothing of a remote one is kept
    except CacheUnsealed as error:
        print(f"but {advised(error)}")

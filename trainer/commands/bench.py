"""`dit-train bench`: what inference costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_schema.options import with_options
from cache_schema.settings import Values
from trainer.commands.opening import open_for
from trainer.reports.bench_config import BENCH, BenchConfig

if TYPE_CHECKING:
    from cache_schema import Cache
    from trainer.methods.method import Method
    from trainer.models.student import Student


@with_options(BENCH, ["batch", "seconds", "warmup", "precision", "threads", "device"])
def bench(
    given: Values,
    run: Annotated[Path, typer.Argument(help="Folder of a run, of an export, or a student.safetensors.")],
    cache: Annotated[str | None, typer.Option(help="The run's cache, if it has moved: for the GIM's line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Latency and throughput: the student, timm's network alone, and the student with GIM and teacher."""
    _bench(BENCH.make({}, given), run, cache, as_json)


def _bench(config: BenchConfig, run: Path, named: str | None, as_json: bool) -> None:
    import torch

    from trainer.device import choose_device, use_device
    from trainer.models.opening import open_student
    from trainer.reports.bench import format_bench, run_bench

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    where = use_device(device)
    student = open_student(run).to(device)
    method, cache = _with_teacher(run, student, named)
    found = run_bench(student, config, device, method, cache)
    about = {
        "student": student.name, "size": student.input_size, "precision": config.precision, "device": str(device),
        "threads": torch.get_num_threads(), "batch": config.batch,
    }  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**about, **found.values()}, indent=2))
        return
    threads = f", threads {about['threads']}" if device.type == "cpu" else ""
    typer.echo(f"{student.name}, {student.input_size} pixels, {config.precision}, {where}{threads}")
    typer.echo(format_bench(found, config.batch))


def _with_teacher(run: Path, student: Student, named: str | None) -> tuple[Method | None, Cache | None]:
    """What the method of a run adds at test time, and the cache of its features; nothing where there is neither."""
    from cache_schema.errors import CacheError
    from trainer.methods.trained import load_trained
    from trainer.runs import cache_of_run, is_finished

    if not is_finished(run):
        return None, None
    try:
        cache = open_for(named or cache_of_run(run), allow_partial=True, verify=False)
    except (CacheError, OSError) as error:
        if named is not None:
            raise
        typer.echo(f"note: nothing is said of GIM and teacher ({error}); --cache names the cache", err=True)
        return None, None
    method = load_trained(run, student, cache)
    return (method, cache) if method.auxiliary_names else (None, None)

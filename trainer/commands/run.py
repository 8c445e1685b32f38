"""`dit-train run`: train a student."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_schema.options import Exposed, with_options
from cache_schema.settings import Values
from trainer.commands.opening import open_for
from trainer.config import PRESETS, name_preset
from trainer.methods.registry import DEFAULT, METHODS
from trainer.methods.settings import require_weights, settings_of

if TYPE_CHECKING:
    from trainer.config import TrainConfig

DEFAULT_CACHE = Path("runs/demo/cache")


SHOWN = (
    Exposed("cache", shown=str(DEFAULT_CACHE)),
    Exposed("epochs", shown="of the preset"), "updates", Exposed("batch_size", shown="of the preset"),
    "sampler", "classes_per_batch", "images_per_class", "seed",
    "validation_classes", "eval_every", "against", Exposed("follow", shown="of the preset"), "keep_checkpoints",
    Exposed("optim.lr", shown="of the preset", help="Peak learning rate."),
    Exposed("loss.alpha", shown="of the preset", help="Weight of CAL (method gcd)."),
    Exposed("loss.tau", help="Temperature of DRC."),
    Exposed("timesteps", help="Curriculum timesteps, e.g. 22,28; all by default (method gcd)."),
    Exposed("timesteps_per_step", help="Of those, drawn anew for each image at each update; all by default (gcd)."),
    Exposed("tap", help="Teacher features to read (method gcd)."),
    Exposed("student.name", "--student", shown="of the preset", help="Student network, by timm name."),
    Exposed("student.img_size", "--image-size", shown="of the preset, else of the network"),
    Exposed("student.pretrained", "--pretrained", help="Start from timm's weights."),
    Exposed("student.weights", "--student-weights", help="Start from this safetensors file."),
    "compile", "deterministic", "device", "workers", "local_cache", "track",
)  # fmt: skip


@with_options(settings_of(DEFAULT), SHOWN)
def run(
    given: Values,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run; default: beside the cache (runs/NAME for one at a URL).")
    ] = None,
    method: Annotated[str | None, typer.Option(help=f"{', '.join(METHODS)}; default {DEFAULT} (DiT-Distill).")] = None,
    mode: Annotated[str | None, typer.Option(help="The same: distill (gcd), baseline, auxiliary, …")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(map(name_preset, PRESETS))}; default: demo for the demo data set, else recommended."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field, e.g. student.depth=4; repeatable."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue an interrupted run; exactly on a CPU, and on a GPU with --deterministic."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output directory.")] = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept an unsealed cache.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the run's config and stop.")] = False,
) -> None:
    """Train a student by a method: distilled from the cache's features (gcd), or alone (baseline)."""
    cache: str | None = given.get("cache")
    flags = {**given, "method": method, "mode": mode}
    output = output or _default_output(cache, mode, method)
    config, said, chosen = _config_of_run(output, preset, settings or [], flags, resume)
    if print_config:
        typer.echo(config.model_dump_json(indent=2))
        return
    require_weights(config, chosen)
    from trainer.processes import one_speaks

    with one_speaks():
        _train(config, said, output, resume, overwrite, allow_partial)


def _default_output(cache: str | None, mode: str | None, method: str | None) -> Path:
    from trainer.methods.registry import DEFAULT, mode_name

    name = mode or mode_name(method or DEFAULT)
    if cache is not None and "://" in cache and not cache.startswith("file://"):
        return Path("runs", cache.rstrip("/").rpartition("/")[2], name)
    return Path((cache or str(DEFAULT_CACHE)).removeprefix("file://")).resolve().parent / name


def _preset_for(cache: str) -> str:
    """The demo's cache asks for the demo's small student; whatever is wrong with a cache is said when it is opened."""
    from cache_schema import CacheError
    from cache_schema.format.manifest_file import load_manifest
    from cache_schema.storage.places import folder_at

    try:
        name = load_manifest(folder_at(cache)).dataset.name
    except CacheError:
        return "recommended"
    return "demo" if name == "demo" else "recommended"


def _config_of_run(
    output: Path, preset: str | None, settings: list[str], flags: dict[str, Any], resume: bool
) -> tuple[TrainConfig, str, str | None]:
    """The config asked for, what to say of it, and the preset it began with.

    A bare `--resume` takes the config that the run was started with.
    """
    from trainer.methods.settings import (
        changes,
        idle_settings,
        load_config,
        make_config,
        preset_student,
        with_absolute_paths,
    )
    from trainer.runs import CONFIG

    started = output / CONFIG
    before = load_config(started) if resume and started.is_file() else None
    resumable = settings_of(DEFAULT if before is None else before.method).resumable()
    free = {name: value for name, value in flags.items() if name in resumable and value is not None}
    asked = preset or settings or any(value is not None for name, value in flags.items() if name not in free)
    if before is not None and not asked:
        config = before.model_copy(update=free)
    else:
        cache = flags.get("cache") or (before.cache if before else str(DEFAULT_CACHE))
        chosen = preset or _preset_for(cache)
        config = make_config(chosen, settings, **{**flags, "cache": cache})
        own = preset_student(chosen)
        if own not in (None, config.student.name):
            typer.echo(f"note: student {config.student.name} as timm has it; preset {chosen} is of {own}", err=True)
        for idle in idle_settings(config, chosen):
            typer.echo(f"note: {idle}", err=True)
    config = with_absolute_paths(config)
    if before is not None and not asked:
        return config, f"method {config.method}, as the run was started", None
    said = f"method {config.method}, preset {name_preset(chosen)}"
    return config, f"{said}\n{changes(config, chosen)}".rstrip(), chosen


def _train(config: TrainConfig, said: str, output: Path, resume: bool, overwrite: bool, allow_partial: bool) -> None:
    from cache_schema import CacheNotFound
    from trainer.errors import TrainError
    from trainer.runs import is_finished, load_result
    from trainer.training.run_folder import check_run

    check_run(output, config, resume, overwrite)
    if is_finished(output) and not overwrite:
        result = load_result(output)
        typer.echo(f"{output} is finished already: {result['student_updates']} updates")
        typer.echo(_next_line(output))
        return
    try:
        cache = open_for(config.cache, allow_partial, config.verify_reads, config.local_cache)
    except CacheNotFound as error:
        raise TrainError(f"{error}; make one with dit-cache build, or name one with --cache") from None
    typer.echo(f"cache {cache.manifest.label}: {len(cache)} rows with features; {said}")

    from trainer.training.loop import train
    from trainer.training.summary import summary

    result = train(config, cache, output, resume=resume, overwrite=overwrite)
    losses = ", ".join(f"{name} {value:.4f}" for name, value in result["final_losses"].items())
    typer.echo(f"{output}: {result['student_updates']} updates in {result['seconds']:.0f} s; last epoch: {losses}")
    typer.echo(summary(result, cache.manifest.label))
    typer.echo(_next_line(output))


def _next_line(output: Path) -> str:
    """Where a run's result is, and the command that goes on from there."""
    return f"the student is in {output}; next: {shlex.join(['dit-train', 'eval', str(output)])}"

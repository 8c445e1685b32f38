"""The `dit-train` command. Anything heavy is imported by the sub-command that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_schema import cli as commands

if TYPE_CHECKING:
    from cache_schema import Cache
    from trainer.config import TrainConfig

DEFAULT_CACHE = Path("runs/demo/cache")

app = typer.Typer(
    name="dit-train",
    help="Train a retrieval student from a teacher cache, evaluate it, report on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    pass


@app.command("run")
def run_command(
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run; default: beside the cache, named by the mode.")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Teacher cache to train from; default runs/demo/cache.")] = None,
    mode: Annotated[str | None, typer.Option(help="distill (default) or baseline.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="paper, small or demo; default: demo for the demo data set, else paper.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the labelled images.")] = None,
    updates: Annotated[int | None, typer.Option(help="Student updates, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Labelled images per update.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of CAL.")] = None,
    tau: Annotated[float | None, typer.Option(help="Temperature of DRC.")] = None,
    seed: Annotated[int | None, typer.Option(help="The one seed of the run.")] = None,
    timesteps: Annotated[str | None, typer.Option(help="Curriculum timesteps, e.g. 22,28; all by default.")] = None,
    tap: Annotated[str | None, typer.Option(help="Teacher features to read, e.g. hidden.")] = None,
    student: Annotated[str | None, typer.Option(help="Student network, by timm name.")] = None,
    pretrained: Annotated[bool | None, typer.Option("--pretrained", help="Start from timm's weights.")] = None,
    student_weights: Annotated[str | None, typer.Option(help="Start from this safetensors file.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu, cuda, cuda:1, …")] = None,
    workers: Annotated[int | None, typer.Option(help="Loader processes; 0: one thread.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field, e.g. student.depth=4; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, exactly.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output directory.")] = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept an unsealed cache.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the run's config and stop.")] = False,
) -> None:
    """Train a student: with DRC alone (baseline), or distilled from the cache's features (distill)."""
    flags = {
        "cache": cache, "mode": mode, "epochs": epochs, "updates": updates, "batch_size": batch_size, "seed": seed,
        "timesteps": timesteps, "tap": tap, "device": device, "workers": workers, "optim__lr": lr,
        "loss__alpha": alpha, "loss__tau": tau, "student__name": student, "student__pretrained": pretrained,
        "student__weights": student_weights,
    }  # fmt: skip
    output = output or _default_output(cache, mode)
    config = _config_of_run(output, preset, settings or [], flags, resume)
    if print_config:
        typer.echo(config.model_dump_json(indent=2))
        return
    _train(config, output, resume, overwrite, allow_partial)


@app.command("eval")
def eval_command(
    run: Annotated[Path, typer.Argument(help="A run's directory, or a student.safetensors.")],
    cache: Annotated[str | None, typer.Option(help="Cache to evaluate on; by default the run's own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    save_embeddings: Annotated[Path | None, typer.Option(help="Also write the embeddings (.npz).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept an unsealed cache.")] = False,
) -> None:
    """Recall@1/2/4/8 and mAP@R on the test split: every image queries all the others."""
    import json

    from trainer.device import choose_device
    from trainer.evaluation import evaluate
    from trainer.training.run_folder import write_json

    opened = _open(cache or evaluate.cache_of_run(run), allow_partial)
    scores, embeddings, test = evaluate.evaluate_run(run, opened, choose_device(device))
    if run.is_dir():
        write_json(run / "eval.json", scores)
    if save_embeddings is not None:
        evaluate.save_embeddings(save_embeddings, embeddings, test)
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
        return
    typer.echo(f"{run}: {scores['queries']} queries of {scores['classes']} classes never trained on, percent")
    typer.echo(evaluate.format_scores(scores))


@app.command("report")
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.")],
    output: Annotated[Path, typer.Option(help="Where report.html and summary.json go.")],
    cache: Annotated[str | None, typer.Option(help="The runs' cache, if it has moved.")] = None,
    started: Annotated[
        float | None, typer.Option(help="Start of the whole job, seconds since 1970: `date +%s`.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept an unsealed cache.")] = False,
) -> None:
    """One HTML page and one JSON file on a set of runs: recalls, loss curves, a retrieval gallery."""
    from trainer.device import choose_device
    from trainer.evaluation.evaluate import cache_of_run
    from trainer.reports import report

    opened = _open(cache or cache_of_run(runs[0]), allow_partial)
    where = choose_device(device)
    finished = report.load_runs(runs, opened, where)
    report.write_report(finished, opened, output, where, started)
    typer.echo(report.format_runs(finished))
    typer.echo(f"wrote {output / 'report.html'} and {output / 'summary.json'}")


def main() -> None:
    """Entry point of the `dit-train` command."""
    commands.run(app, interrupted_hint="run the same command again with --resume to continue where it stopped")


def _default_output(cache: str | None, mode: str | None) -> Path:
    return Path(cache or DEFAULT_CACHE).resolve().parent / (mode or "distill")


def _preset_for(cache: str) -> str:
    """The demo's cache asks for the demo's small student; whatever is wrong with a cache is said when it is opened."""
    import json

    try:
        name = json.loads((Path(cache) / "manifest.json").read_text(encoding="utf-8"))["dataset"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return "paper"
    return "demo" if name == "demo" else "paper"


def _config_of_run(
    output: Path, preset: str | None, settings: list[str], flags: dict[str, Any], resume: bool
) -> TrainConfig:
    """The config asked for; a bare `--resume` takes the one the run was started with."""
    from trainer.config import FREE_ON_RESUME, load_config, make_config

    started = output / "config.json"
    before = load_config(started) if resume and started.is_file() else None
    free = {name: value for name, value in flags.items() if name in FREE_ON_RESUME and value is not None}
    asked = preset or settings or any(value is not None for name, value in flags.items() if name not in free)
    if before is not None and not asked:
        config = before.model_copy(update=free)
    else:
        cache = flags["cache"] or (before.cache if before else str(DEFAULT_CACHE))
        config = make_config(preset or _preset_for(cache), settings, **{**flags, "cache": cache})
    if config.cache and "://" not in config.cache:
        config = config.model_copy(update={"cache": str(Path(config.cache).resolve())})
    return config


def _open(path: str, allow_partial: bool, verify: bool = True) -> Cache:
    """Open a cache; where it is not complete and that is accepted, say how much is missing."""
    from cache_schema import open_cache

    cache = open_cache(path, allow_partial=allow_partial, verify=verify)
    if not cache.manifest.sealed:
        missing, total = cache.missing_samples, cache.manifest.dataset.feature_rows
        note = f"note: cache {path} is not sealed: {missing} of {total} samples have no features yet"
        typer.echo(note, err=True)
    return cache


def _train(config: TrainConfig, output: Path, resume: bool, overwrite: bool, allow_partial: bool) -> None:
    from cache_schema import CacheNotFound
    from trainer.config import describe
    from trainer.errors import TrainError
    from trainer.training.run_folder import check_run, is_finished, load_result

    check_run(output, config, resume, overwrite)
    if is_finished(output) and not overwrite:
        result = load_result(output)
        typer.echo(f"{output} is finished already: {result['student_updates']} updates")
        return
    try:
        cache = _open(config.cache, allow_partial, config.verify_reads)
    except CacheNotFound as error:
        raise TrainError(f"{error}; make one with dit-cache build, or name one with --cache") from None
    typer.echo(f"cache {cache.manifest.label}: {len(cache)} rows with features\n{describe(config)}")

    from trainer.training.loop import train

    result = train(config, cache, output, resume=resume, overwrite=overwrite)
    losses = ", ".join(f"{name} {value:.4f}" for name, value in result["final_losses"].items())
    typer.echo(f"{output}: {result['student_updates']} updates in {result['seconds']:.0f} s; last epoch: {losses}")

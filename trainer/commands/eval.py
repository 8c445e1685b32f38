"""`dit-train eval`: score a student on classes never trained on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.opening import open_for
from trainer.runs import SplitName

_CLASSES: dict[SplitName, str] = {
    "test": "classes never trained on",
    "validation": "classes held out of the training split",
}


def eval_run(
    run: Annotated[Path, typer.Argument(help="A run's directory, or a student.safetensors.")],
    cache: Annotated[
        str | None, typer.Option(help="Cache to evaluate on (folder or URL); default the run's own.")
    ] = None,
    split: Annotated[
        SplitName, typer.Option(help="test, or validation: the training classes that the run held out.")
    ] = "test",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    save_embeddings: Annotated[Path | None, typer.Option(help="Also write the embeddings (.npz).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    local_cache: Annotated[
        str | None, typer.Option(help="Disk that may hold what was fetched of a cache at a URL, e.g. 50GB.")
    ] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept an unsealed cache.")] = False,
) -> None:
    """Recall@1/2/4/8 and mAP@R on classes never trained on: every image queries all the others."""
    from trainer.device import choose_device, use_device
    from trainer.evaluation import evaluate
    from trainer.evaluation.tables import format_scores
    from trainer.methods.trained import load_trained
    from trainer.runs import cache_of_run
    from trainer.training.run_folder import save_scores

    opened = open_for(cache or cache_of_run(run), allow_partial, local_cache=local_cache)
    where = choose_device(device)
    named = use_device(where)
    scores, embeddings, test = evaluate.evaluate_run(run, opened, where, load_trained, split)
    if as_json:
        typer.echo(json.dumps(scores, indent=2))
    else:
        typer.echo(named)
        typer.echo(f"{run}: {scores['queries']} queries of {scores['classes']} {_CLASSES[split]}, percent")
        typer.echo(format_scores(scores))
    saved = save_scores(run, split, scores) if run.is_dir() else None
    if saved is not None and not as_json:
        command = shlex.join(["dit-train", "report", str(run), "--output", str(run)])
        typer.echo(f"the scores are in {saved}; next: {command}")
    if save_embeddings is not None:
        evaluate.save_embeddings(save_embeddings, embeddings, test)

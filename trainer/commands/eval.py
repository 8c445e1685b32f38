"""`dit-train eval`: score a student on classes never trained on."""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.commands.opening import open_for, require_student_alone
from trainer.runs import SplitName

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cache_schema import Cache
    from trainer.evaluation.details import QueryScores
    from trainer.evaluation.embed import Scored

_CLASSES: dict[SplitName, str] = {
    "test": "classes never trained on",
    "validation": "classes held out of the training split",
}


def eval_run(
    runs: Annotated[list[Path], typer.Argument(help="Runs' directories, student.safetensors files, or exports.")],
    cache: Annotated[
        str | None, typer.Option(help="Cache to evaluate on (folder or URL); default the first run's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Instead of a cache: a folder of images, with a folder for each class.")
    ] = None,
    split: Annotated[
        SplitName, typer.Option(help="test, or validation: the training classes that the run held out.")
    ] = "test",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Of the runs: best on validation classes, last, or a checkpoint's folder; default: the student."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    save_embeddings: Annotated[Path | None, typer.Option(help="Also write the embeddings (.npz); of one run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also a line per class, the worst first.")] = False,
    local_cache: Annotated[
        str | None, typer.Option(help="Disk that may hold what was fetched of a cache at a URL, e.g. 50GB.")
    ] = None,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept an unsealed cache.")] = False,
) -> None:
    """Recall@1/2/4/8, mAP@R and R-Precision on classes never trained on: every image queries all the others.

    Of several runs each but the first is held against the first, image by image.
    """
    from trainer.device import choose_device, use_device
    from trainer.errors import TrainError
    from trainer.evaluation import details, evaluate, tables
    from trainer.evaluation.worth import not_followed
    from trainer.runs import cache_of_run, is_finished, load_result
    from trainer.training.chosen import run_at
    from trainer.training.run_folder import save_scores

    if save_embeddings is not None and len(runs) > 1:
        raise TrainError("--save-embeddings is for one run; give one")
    if data is not None and (cache is not None or split != "test"):
        raise TrainError("--data names the images to score; give no --cache and no --split with it")
    opened = None
    if data is None:
        opened = open_for(cache or cache_of_run(runs[0]), allow_partial, local_cache=local_cache)
    where = choose_device(device)
    named = use_device(where)
    if not as_json:
        typer.echo(named)
    found: list[dict[str, Any]] = []
    first = None
    for run in runs:
        with nullcontext(run) if checkpoint is None else run_at(run, checkpoint, opened) as scored:
            scores, embeddings, test, queries = _evaluate(scored, opened, data, where, split)
            kept = opened is not None and is_finished(scored) and run in (scored, scored.parent)  # not one laid out
        scores = {**scores, **details.describe_queries(queries, details.class_names(test))}
        if checkpoint is not None:
            scores["checkpoint"] = checkpoint
        if first is not None:
            scores["against"] = {"run": str(runs[0]), "difference": details.compare(queries, first)}
        first = first or queries
        found.append(scores)
        if not as_json:
            which = "" if checkpoint is None else f", {Path(checkpoint).name}"
            classes = f"classes of {data}" if data is not None else _CLASSES[split]
            typer.echo(f"{run}{which}: {scores['queries']} queries of {scores['classes']} {classes}, percent")
            typer.echo(tables.format_scores(scores))
            why = not_followed(load_result(scored)) if opened is not None and is_finished(scored) else None
            if why:
                typer.echo(f"note: its teacher was {why}", err=True)
            remark = tables.remark_on(scores)
            if remark:
                typer.echo(remark, err=True)
            typer.echo(tables.format_details(scores, per_class))
        saved = save_scores(scored, split, scores) if kept else None
        if saved is not None and not as_json:
            command = shlex.join(["dit-train", "report", str(run), "--output", str(run)])
            typer.echo(f"the scores are in {saved}" + (f"; next: {command}" if scored == run else ""))
    if as_json:
        by_run = {str(run): scores for run, scores in zip(runs, found, strict=True)}
        typer.echo(json.dumps(found[0] if len(runs) == 1 else by_run, indent=2))
    if save_embeddings is not None:
        evaluate.save_embeddings(save_embeddings, embeddings, test)


def _evaluate(
    run: Path, cache: Cache | None, data: Path | None, device: torch.device, split: SplitName
) -> tuple[dict[str, Any], dict[str, Tensor], Scored, QueryScores]:
    """Scores, embeddings, what was scored and each query's scores: of a split of a cache, or of a folder's images."""
    from trainer.evaluation.evaluate import evaluate_folder, evaluate_queries
    from trainer.evaluation.folder import open_folder_split
    from trainer.methods.trained import load_trained
    from trainer.retrieval.model import open_model

    if cache is not None:
        return evaluate_queries(run, cache, device, load_trained, split)
    assert data is not None
    require_student_alone(run)
    model = open_model(run, str(device))
    test = open_folder_split(data, model.prepare)
    scores, embeddings, queries = evaluate_folder(model.student, test, device)
    return {"data": str(data), **scores}, embeddings, test, queries

"""`dit-train report`: what a set of runs came to, as one page for people and one JSON file for programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cache_schema.settings import flatten
from cache_schema.storage.files import write_file
from trainer.config import TrainConfig
from trainer.errors import TrainError
from trainer.evaluation.details import QueryScores, class_names, score_each_query
from trainer.evaluation.embed import TestSplit, embed_students, open_test_split
from trainer.evaluation.evaluate import evaluate_run, scored_embedding
from trainer.evaluation.intervals import class_bootstrap, paired_class_bootstrap
from trainer.evaluation.metrics import COLUMNS
from trainer.evaluation.tables import auxiliary_condition, format_table, headline, reads_teacher
from trainer.methods.registry import find_method
from trainer.methods.trained import config_as_trained, load_trained
from trainer.models.student import load_student
from trainer.reports.attention import Look, look
from trainer.reports.embedding_map import map_figure
from trainer.reports.figures import loss_figure, recall_figure
from trainer.reports.gallery import make_gallery, thumbnails
from trainer.reports.page import TEACHER, Page, RunView, render_page
from trainer.runs import LOG, SCORES, load_result, read_json, read_metrics
from trainer.training.run_folder import save_scores, write_json

if TYPE_CHECKING:
    from cache_schema import Cache


@dataclass(frozen=True)
class FinishedRun:
    """A finished, evaluated run."""

    path: Path
    name: str
    config: TrainConfig
    result: dict[str, Any]
    scores: dict[str, Any]


def load_runs(paths: Sequence[Path], cache: Cache, device: torch.device) -> list[FinishedRun]:
    """Load finished runs of one cache, evaluating those that were not; raises TrainError for any other."""
    runs = []
    for path, name in zip(paths, _names(paths), strict=True):
        result = load_result(path)
        if result["cache_id"] != cache.manifest.cache_id:
            raise TrainError(f"{path} was trained on cache {result['cache_id'][:8]}, not on {cache.manifest.label}")
        scores = _stored_scores(path, cache)
        if scores is None:
            scores = evaluate_run(path, cache, device, load_trained)[0]
            save_scores(path, "test", scores)
        runs.append(FinishedRun(path, name, config_as_trained(path), result, scores))
    return runs


def write_report(
    runs: Sequence[FinishedRun], cache: Cache, folder: Path, device: torch.device, started: float | None = None
) -> dict[str, Any]:
    """Write `report.html` and `summary.json` into `folder`; returns the summary.

    `started` (seconds since the epoch) makes the summary's `seconds` the wall clock of the whole job; without it
    they are the training time of the runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = render_page(_make_page(runs, cache, device))
    write_file(folder / "report.html", page.encode())
    seconds = sum(run.result["seconds"] for run in runs) if started is None else time.time() - started
    summary = summarise(runs, cache.manifest.cache_id, seconds)
    write_json(folder / "summary.json", summary)
    return summary


def summarise(runs: Sequence[FinishedRun], cache_id: str, seconds: float) -> dict[str, Any]:
    """The summary: for each mode its recalls, MAP@R and updates, as means where several runs have that mode."""
    summary: dict[str, Any] = {"seconds": round(seconds, 1), "cache_id": cache_id}
    for mode in dict.fromkeys(run.result["mode"] for run in runs):
        same = [run for run in runs if run.result["mode"] == mode]
        summary[mode] = {
            **{metric: fmean(headline(run.scores)[metric] for run in same) for metric in COLUMNS},
            "student_updates": same[0].result["student_updates"],
            "seeds": [run.result["seed"] for run in same],
            "seconds": round(fmean(run.result["seconds"] for run in same), 1),
        }
        if len(same) > 1:
            spread = {metric: stdev(headline(run.scores)[metric] for run in same) for metric in COLUMNS}
            summary[mode]["standard_deviation"] = spread
        auxiliary = [run.scores["auxiliary"] for run in same if run.scores["auxiliary"]]
        if auxiliary:
            summary[mode]["auxiliary"] = {
                name: {metric: fmean(scores[name]["mean"][metric] for scores in auxiliary) for metric in COLUMNS}
                for name in auxiliary[0]
            }
    return summary


def format_runs(runs: Sequence[FinishedRun]) -> str:
    """The table a person reads: a line per run, percent, and the auxiliary embeddings' where they were measured."""
    lines = []
    for run in runs:
        lines.append((_with_teacher(run), headline(run.scores)))
        if reads_teacher(run.scores):
            lines.append(("  its student alone", run.scores["student"]))
            continue
        for name, by_timestep in (run.scores["auxiliary"] or {}).items():
            about = f"  with the teacher at test time, {auxiliary_condition(run.scores, name)}"
            lines.append((about, by_timestep["mean"]))
    return format_table(lines)


def _with_teacher(run: FinishedRun) -> str:
    """A run's name, and where it is no student alone, that it is not."""
    return run.name + TEACHER * reads_teacher(run.scores)


def _make_page(runs: Sequence[FinishedRun], cache: Cache, device: torch.device) -> Page:
    embeddings, queries = {}, {}
    for run in runs:
        embeddings[run.name], test = _embed(run, cache, device)
        queries[run.name] = score_each_query(embeddings[run.name], test, device)
    gallery = make_gallery(embeddings, test.split.rows, test.labels)
    shown = [e.row for group in gallery for e in group.examples]
    shown += [hit.row for g in gallery for e in g.examples for hits in e.found.values() for hit in hits]
    names = cache.samples["class_name"]
    dataset = cache.manifest.dataset
    first = queries[runs[0].name]
    return Page(
        title=f"DiT-Distill on {dataset.name}",
        subtitle=(
            f"{len(test.split.rows):,} test images of {test.split.classes} unseen classes of {dataset.superclass}; "
            f"cache {cache.manifest.cache_id[:12]}, {len(cache):,} rows of teacher features"
        ),
        runs=[_view(run, queries[run.name], None if run is runs[0] else first) for run in runs],
        recall_figure=recall_figure({_with_teacher(run): headline(run.scores) for run in runs}),
        loss_figure=loss_figure({run.name: measured_log(run) for run in runs}, _loss_panels(runs)),
        map_figure=map_figure(embeddings, test.split.labels, class_names(test), first.classes != first.nearest),
        looks=[each for run in runs for each in _looks(run, cache, device)],
        gallery=gallery,
        images=thumbnails(cache, shown),
        classes={row: names[row].as_py() for row in shown},
    )


def _embed(run: FinishedRun, cache: Cache, device: torch.device) -> tuple[Tensor, TestSplit]:
    """The embeddings of the test images that a run is compared by, (N, C)."""
    if reads_teacher(run.scores):
        scores, found, test = evaluate_run(run.path, cache, device, load_trained)
        return scored_embedding(scores, found), test
    student = load_student(run.path).to(device)
    test = open_test_split(cache, student.input_size, run.config.image_memory_gb, fit=student.fit)
    return embed_students(student, test, device), test


def _view(run: FinishedRun, queries: QueryScores, against: QueryScores | None) -> RunView:
    """What the page shows of a run: with intervals over classes, and its gain over another on the same queries."""
    recall, gain = queries.values["recall_at_1"], None
    if against is not None:
        gain = paired_class_bootstrap(recall, against.values["recall_at_1"], queries.classes)
    return RunView(
        run.name,
        run.result,
        run.scores,
        flatten(run.config.model_dump()),
        {name: class_bootstrap(queries.values[name], queries.classes) for name in COLUMNS},
        gain,
    )


def _looks(run: FinishedRun, cache: Cache, device: torch.device) -> list[Look]:
    if not find_method(run.config.method).readers:
        return []
    return look(run.name, load_trained(run.path, load_student(run.path).to(device), cache), cache, device)


def _loss_panels(runs: Sequence[FinishedRun]) -> dict[str, dict[str, str]]:
    """The losses of each figure, as the runs' methods group them: title → {loss: what it is measured on}."""
    panels: dict[str, dict[str, str]] = {}
    for method in dict.fromkeys(run.config.method for run in runs):
        for title, losses in find_method(method).loss_figures.items():
            panels[title] = {**panels.get(title, {}), **losses}
    return panels


def measured_log(run: FinishedRun) -> list[dict[str, Any]]:
    """The run's log, with what it scored at its end on the classes that the log's scores are of: never test classes."""
    scores = run.result.get("validation")
    final = [{"update": run.result["student_updates"], "eval": scores}] if scores else []
    return [*read_metrics(run.path / LOG), *final]


def _stored_scores(path: Path, cache: Cache) -> dict[str, Any] | None:
    """The run's eval.json, if it is of this cache."""
    file = path / SCORES
    if not file.is_file():
        return None
    scores = read_json(file)
    return scores if scores.get("cache_id") == cache.manifest.cache_id else None


def _names(paths: Sequence[Path]) -> list[str]:
    """Directory names, with as many parents as it takes to tell the runs apart."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise TrainError("the same run is given twice")
    depth = 1
    while len({path.parts[-depth:] for path in resolved}) < len(resolved):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in resolved]

"""Evaluation on the classes never trained on: the student alone, and what its method offers at test time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.splits import Split, hold_out_classes, select_split
from trainer.errors import TrainError
from trainer.evaluation.details import QueryScores, of_images, score_each_query
from trainer.evaluation.embed import (
    Auxiliary,
    Scored,
    TestSplit,
    embed_auxiliary,
    embed_students,
    open_test_split,
    open_validation_split,
)
from trainer.evaluation.frozen import embed_frozen
from trainer.evaluation.metrics import mean_scores, retrieval_scores, score_queries
from trainer.models.opening import is_export, open_student
from trainer.models.student import Student
from trainer.runs import SplitName, load_result, validation_share

if TYPE_CHECKING:
    from cache_schema import Cache

# Finds what a run offers beside its student, made to fit the features of a cache.
LoadAuxiliary = Callable[[Path, Student, "Cache"], Auxiliary]


def average_timesteps(embeddings: Tensor) -> Tensor:
    """One embedding per image: the mean over timesteps of the normalised embeddings, (N, P, C) -> (N, C)."""
    return F.normalize(embeddings, dim=-1).mean(1)


def evaluate_modules(
    student: Student, test: TestSplit, device: torch.device, auxiliary: Auxiliary | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Scores and embeddings of a student and, where the test rows have features, of the auxiliary embeddings.

    Scores: {"student": …, "auxiliary": {name: {"mean"|"<timestep>": …}} or None, "scored": the name of what the method
    is compared by}; embeddings by the names "student" and those of `auxiliary.auxiliary_names`. Raises TrainError
    where a method that is scored by an auxiliary embedding has no features to make it of.
    """
    return _evaluate(student, test, device, auxiliary)[:2]


def _evaluate(
    student: Student, test: TestSplit, device: torch.device, auxiliary: Auxiliary | None
) -> tuple[dict[str, Any], dict[str, Tensor], QueryScores]:
    name = "student" if auxiliary is None else auxiliary.scored
    embeddings = {"student": embed_students(student, test, device)}
    values, nearest = score_queries(embeddings["student"].to(device), test.labels.to(device))
    scores: dict[str, Any] = {"student": mean_scores(values), "auxiliary": None, "scored": name}
    found = {} if auxiliary is None else embed_auxiliary(auxiliary, embeddings["student"], test, device)
    if name != "student" and name not in found:
        raise TrainError(
            "this run reads the teacher's features at test time, and the cache has none of all images to be scored: "
            "build it with --features train,test (and unlabeled, where there are such images)"
        )
    if auxiliary is not None and found:
        timesteps, names = auxiliary.auxiliary_timesteps, auxiliary.auxiliary_names
        labels = test.labels.to(device)
        scores["auxiliary"] = {
            name: _score_auxiliary(part.to(device), labels, timesteps) for name, part in found.items()
        }
        scores["auxiliary_names"] = {name: names[name] for name in found}
    embeddings = {**embeddings, **found}
    if name == "student":
        return scores, embeddings, of_images(values, nearest, test)
    return scores, embeddings, score_each_query(scored_embedding(scores, embeddings), test, device)


def scored_embedding(scores: Mapping[str, Any], embeddings: Mapping[str, Tensor]) -> Tensor:
    """What a run is compared by, of the embeddings that `evaluate_modules` gives: (N, C)."""
    found = embeddings[str(scores.get("scored", "student"))]
    return found if found.dim() == 2 else average_timesteps(found)


def _score_auxiliary(embeddings: Tensor, labels: Tensor, timesteps: tuple[int, ...]) -> dict[str, Any]:
    if embeddings.dim() == 2:
        return {"mean": retrieval_scores(embeddings, labels)}
    by_timestep = {str(t): retrieval_scores(embeddings[:, p], labels) for p, t in enumerate(timesteps)}
    return {"mean": retrieval_scores(average_timesteps(embeddings), labels), **by_timestep}


def evaluate_run(
    path: Path,
    cache: Cache,
    device: torch.device,
    load_auxiliary: LoadAuxiliary | None = None,
    split: SplitName = "test",
) -> tuple[dict[str, Any], dict[str, Tensor], TestSplit]:
    """Evaluate a run's folder, a lone `student.safetensors` or an export on the cache's test split.

    With the split "validation", on the training classes that the run held out. Returns what `eval.json` holds, the
    embeddings by name, and the rows that were scored. Raises TrainError when the run does not fit the cache.
    """
    return evaluate_queries(path, cache, device, load_auxiliary, split)[:3]


def evaluate_queries(
    path: Path,
    cache: Cache,
    device: torch.device,
    load_auxiliary: LoadAuxiliary | None = None,
    split: SplitName = "test",
) -> tuple[dict[str, Any], dict[str, Tensor], TestSplit, QueryScores]:
    """The same, and one by one the scores of the queries of what the run is compared by; E_R is ranked once."""
    is_run = path.is_dir() and not is_export(path)
    if is_run or not path.exists():
        load_result(path)  # says so if the run is not finished
    student = open_student(path).to(device)
    auxiliary = None
    if load_auxiliary is not None and is_run:
        auxiliary = load_auxiliary(path, student, cache)
    if split == "validation":
        test = _open_held_out(path, cache, student)
    else:
        test = open_test_split(cache, student.input_size, fit=student.fit)
    scores, embeddings, queries = _evaluate(student, test, device, auxiliary)
    if auxiliary is not None and scores["auxiliary"]:
        scores |= _score_frozen(auxiliary, test, _trained_on(path, cache), device)
    about = {
        "cache_id": cache.manifest.cache_id,
        "split": split,
        "queries": len(test.split.rows),
        "classes": test.split.classes,
    }
    return {**about, **scores}, embeddings, test, queries


def _open_held_out(path: Path, cache: Cache, student: Student) -> TestSplit:
    """The classes that a run held out; raises TrainError for a cache of which others are, trained on by the run."""
    share = validation_share(path)
    result = load_result(path) if share else {}
    if share and result["cache_id"] != cache.manifest.cache_id:
        raise TrainError(
            f"{path} held classes out of cache {result['cache_id'][:8]}, and of {cache.manifest.label} others would be "
            "held out: score it on its own cache"
        )
    test = open_validation_split(cache, share, student.input_size, fit=student.fit)
    trained, held = _trained_on(path, cache).classes, test.split.classes
    before = result["train_classes"], result.get("validation_classes", held)
    if (trained, held) != before:
        raise TrainError(
            f"{path} was trained on {before[0]} classes and held out {before[1]}, and {cache.manifest.label} has "
            f"features of {trained + held} now, of which others would be held out: score it on the cache as it was"
        )
    return test


def _trained_on(path: Path, cache: Cache) -> Split:
    """The rows of a cache that a run was trained on, where it was trained on that cache."""
    return hold_out_classes(select_split(cache, "train", need_features=True), validation_share(path))[0]


def _score_frozen(auxiliary: Auxiliary, test: TestSplit, trained: Split, device: torch.device) -> dict[str, Any]:
    """Scores of the frozen features beside those of what is made of them; nothing where there are none."""
    found = embed_frozen(auxiliary, test, trained, device)
    labels, timesteps = test.labels.to(device), auxiliary.auxiliary_timesteps
    scores = {name: _score_auxiliary(part.to(device), labels, timesteps) for name, part in found.items()}
    return {"frozen": scores, "made_of_teacher": auxiliary.made_of_teacher} if scores else {}


def evaluate_folder(
    student: Student, test: Scored, device: torch.device
) -> tuple[dict[str, Any], dict[str, Tensor], QueryScores]:
    """The same of a student alone on images of a folder: what there would be in `eval.json`, embeddings, queries."""
    embeddings = {"student": embed_students(student, test, device)}
    values, nearest = score_queries(embeddings["student"].to(device), test.labels.to(device))
    about = {"queries": len(test.split.rows), "classes": test.split.classes}
    return {**about, "student": mean_scores(values), "auxiliary": None}, embeddings, of_images(values, nearest, test)


def save_embeddings(file: Path, embeddings: dict[str, Tensor], test: Scored) -> None:
    """Write embeddings, rows, ids and labels of the images that were scored as .npz arrays (no pickle)."""
    rows, ids = test.split.rows, np.array(test.ids)
    arrays = {name: value.numpy() for name, value in embeddings.items()}
    np.savez(file, allow_pickle=False, rows=rows, ids=ids, labels=test.split.labels, **arrays)

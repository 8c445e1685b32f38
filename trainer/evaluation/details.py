"""What stands behind a student's scores: each query's, their intervals, each class's, and what is taken for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.errors import TrainError
from trainer.evaluation.embed import Scored
from trainer.evaluation.intervals import class_bootstrap, paired_class_bootstrap, query_bootstrap
from trainer.evaluation.metrics import DETAILED, score_queries

WORST = 10  # confusions that are kept


@dataclass(frozen=True)
class QueryScores:
    """The scores of every query by name, (N,) float64 each, NaN where undefined; the ids say of which images."""

    ids: list[str]
    classes: np.ndarray  # (N,)
    values: dict[str, np.ndarray]
    nearest: np.ndarray  # (N,) class of the nearest other image


def score_each_query(embeddings: Tensor, test: Scored, device: torch.device) -> QueryScores:
    """Score the queries of a split one by one, on `device`; raises TrainError for embeddings that are not finite."""
    return of_images(*score_queries(embeddings.to(device), test.labels.to(device)), test)


def of_images(values: Mapping[str, Tensor], nearest: Tensor, test: Scored) -> QueryScores:
    """What `score_queries` found of the images that were scored, with their ids."""
    arrays = {name: value.cpu().numpy() for name, value in values.items()}
    return QueryScores(test.ids, test.split.labels, arrays, test.split.labels[nearest.cpu().numpy()])


def describe_queries(queries: QueryScores, names: list[str]) -> dict[str, Any]:
    """Intervals by metric, a line per class, and the worst confusions; `names` of the classes by their label."""
    return {
        "intervals": {
            name: {
                "over_classes": asdict(class_bootstrap(values, queries.classes)),
                "over_queries": asdict(query_bootstrap(values)),
            }
            for name, values in queries.values.items()
        },
        "per_class": _per_class(queries, names),
        "confusions": _confusions(queries, names),
    }


def class_names(test: Scored) -> list[str]:
    """The name of each class of a split by its label; its number where the data set gives none."""
    found = dict(zip(test.split.labels.tolist(), test.class_names, strict=True))
    return [found[label] or str(label) for label in range(test.split.classes)]


def compare(a: QueryScores, b: QueryScores) -> dict[str, Any]:
    """The paired test of a − b for every metric; raises TrainError where they scored different images."""
    if a.ids != b.ids or (a.classes != b.classes).any():
        raise TrainError("runs can be compared on the same images only: give one --cache for all of them")
    return {name: asdict(paired_class_bootstrap(a.values[name], b.values[name], a.classes)) for name in DETAILED}


def _per_class(queries: QueryScores, names: list[str]) -> list[dict[str, Any]]:
    lines = []
    for label, name in enumerate(names):
        own = queries.classes == label
        scores = {metric: values[own] for metric, values in queries.values.items()}
        lines.append(
            {
                "class": name,
                "images": int(own.sum()),
                **{metric: None if np.isnan(v).all() else float(np.nanmean(v)) for metric, v in scores.items()},
            }
        )
    return sorted(lines, key=lambda line: (line["recall_at_1"], line["class"]))


def _confusions(queries: QueryScores, names: list[str]) -> list[dict[str, Any]]:
    wrong = queries.classes != queries.nearest
    pairs = Counter(zip(queries.classes[wrong].tolist(), queries.nearest[wrong].tolist(), strict=True))
    worst = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:WORST]
    return [{"class": names[own], "taken_for": names[other], "images": count} for (own, other), count in worst]

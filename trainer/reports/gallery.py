"""The retrieval gallery of a report: telling queries, and what each run finds for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.evaluation.metrics import ranked_neighbours

if TYPE_CHECKING:
    from cache_schema import Cache

NEIGHBOURS = 8
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class Hit:
    """A retrieved image: its row in the cache, and whether it is of the query's class."""

    row: int
    correct: bool


@dataclass(frozen=True)
class Example:
    """A query's row and, for each run by name, its nearest others, best first."""

    row: int
    found: dict[str, list[Hit]]


@dataclass(frozen=True)
class Group:
    """Queries chosen for one reason, which `title` tells the reader."""

    title: str
    examples: list[Example]


def make_gallery(embeddings: dict[str, Tensor], rows: np.ndarray, labels: Tensor, each: int = 3) -> list[Group]:
    """Choose good and bad queries by a fixed rule: embeddings (N, C) by run, cache rows and labels (N,).

    The last run is compared with the first. Queries of a group are of different classes where there are enough,
    ties go to the lower row: the choice is the same every time.
    """
    ranked = {name: torch.cat([at for _, at in ranked_neighbours(e, NEIGHBOURS)]) for name, e in embeddings.items()}
    correct = {name: labels[at] == labels[:, None] for name, at in ranked.items()}  # (N, 8) each
    hits = {name: relevant.sum(1) for name, relevant in correct.items()}  # (N,)
    first, last = next(iter(hits)), list(hits)[-1]
    gain = hits[last] - hits[first]
    total = torch.stack(list(hits.values())).sum(0)
    # A class of few images cannot fill the row: a query fails by what it could have found and did not.
    findable = ((labels[:, None] == labels).sum(1) - 1).clamp_max(NEIGHBOURS)
    missed = findable * len(hits) - total
    if first == last:
        rules = [("Best queries", total, total > 0), ("Worst queries", missed, missed > 0)]
    else:
        rules = [
            (f"Where {last} finds most that {first} does not", gain * 100 + hits[last], gain > 0),
            (f"Where {last} loses most against {first}", -gain * 100 + hits[first], gain < 0),
            ("Where all runs find most", total, total > 0),
            ("Where all runs miss most", missed, missed > 0),
        ]
    groups = []
    for title, score, allowed in rules:
        chosen = _choose(score, allowed, labels, each)
        examples = [
            Example(
                int(rows[query]),
                {
                    name: [
                        Hit(int(rows[int(i)]), bool(ok))
                        for i, ok in zip(ranked[name][query], correct[name][query], strict=True)
                    ]
                    for name in ranked
                },
            )
            for query in chosen
        ]
        if examples:
            groups.append(Group(title, examples))
    return groups


def thumbnails(cache: Cache, rows: Sequence[int]) -> dict[int, str]:
    """Data URIs of small JPEGs of the given rows' images."""
    unique = sorted(set(rows))
    uris = {}
    for row, data in zip(unique, cache.images(unique), strict=True):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=88)
        uris[row] = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return uris


def _choose(score: Tensor, allowed: Tensor, labels: Tensor, count: int) -> list[int]:
    """The `count` allowed queries of the highest score, of different classes first."""
    order = [int(i) for i in torch.sort(score, descending=True, stable=True).indices if allowed[i]]
    chosen: list[int] = []
    seen: set[int] = set()
    for query in order:
        if len(chosen) < count and int(labels[query]) not in seen:
            chosen.append(query)
            seen.add(int(labels[query]))
    rest = (query for query in order if query not in chosen)
    return chosen + [query for query, _ in zip(rest, range(count - len(chosen)), strict=False)]

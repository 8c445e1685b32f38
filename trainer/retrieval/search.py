"""Searching one or several indexes with a picture, or with an image that is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.data.files import MAX_MEGAPIXELS, UnreadableImageError, decode_image
from trainer.errors import TrainError
from trainer.retrieval.index import Hit, Index
from trainer.retrieval.model import Model

SHOWN = "{rank:>4}  {similarity:9.4f}  {class_name:{width}}  {name}"


@dataclass(frozen=True)
class Found:
    """What one index found: the hits, and why there are none or fewer than were asked for."""

    index: Index
    hits: list[Hit]
    note: str | None


def read_query(file: Path) -> Image.Image:
    """A picture to search with; raises TrainError for a file that is not there or not an image."""
    try:
        return decode_image(file.read_bytes(), MAX_MEGAPIXELS)
    except UnreadableImageError as error:
        raise TrainError(f"{file}: {error}") from None
    except OSError as error:
        raise TrainError(f"{file} cannot be read: {error.strerror or error}") from None


def search_picture(
    picture: Image.Image, index: Index, model: Model, top: int, min_similarity: float | None = None
) -> Found:
    """The images nearest to a picture by the student that made the index."""
    return search_vector(model.embed([model.prepare(picture)])[0], index, top, min_similarity)


def search_item(name: str, index: Index, top: int, min_similarity: float | None = None) -> Found:
    """The images nearest to one that is in the index, but for itself."""
    row = index.row_of(name)
    return search_vector(np.asarray(index.vectors[row]), index, top, min_similarity, row)


def search_vector(
    vector: np.ndarray, index: Index, top: int, min_similarity: float | None = None, skip: int | None = None
) -> Found:
    """The images nearest to an embedding (C,); `skip` is a row to leave out."""
    found = index.search(vector, top, skip)
    if not found:
        return Found(index, [], f"{index.folder} holds no other image")
    hits = [hit for hit in found if min_similarity is None or hit.similarity >= min_similarity]
    if not hits:
        near = found[0]
        note = f"no image is as similar as {min_similarity:g}; the nearest, {near.name}, has {near.similarity:.4f}"
        return Found(index, [], note)
    others = len(index) - (skip is not None)
    return Found(index, hits, f"there are {others} images to find" if others < top else None)


def as_text(query: str, found: Sequence[Found]) -> str:
    """Hits as lines for a person: rank, cosine similarity, class, name."""
    parts = []
    for each in found:
        width = max((len(hit.class_name) for hit in each.hits), default=0)
        lines = [f"{query} in {each.index.folder} ({each.index.label}, {len(each.index):,} images)"]
        lines += [
            SHOWN.format(rank=rank, similarity=h.similarity, class_name=h.class_name or "-", name=h.name, width=width)
            for rank, h in enumerate(each.hits, 1)
        ]
        if each.note:
            lines.append(each.note)
        parts.append("\n".join(lines))
    return "\n".join(parts)


def as_values(query: str, found: Sequence[Found]) -> dict[str, Any]:
    """Hits as plain values, for JSON; distance is 1 − similarity."""
    return {"query": query, "results": [result_values(each) for each in found]}


def result_values(found: Found) -> dict[str, Any]:
    """What one index found, as plain values."""
    hits = [
        {
            "rank": rank,
            "row": hit.row,
            "name": hit.name,
            "class": hit.class_name,
            "similarity": round(hit.similarity, 6),
            "distance": round(1 - hit.similarity, 6),
        }
        for rank, hit in enumerate(found.hits, 1)
    ]
    index = found.index
    return {"index": str(index.folder), "student": index.label, "images": len(index), "note": found.note, "hits": hits}

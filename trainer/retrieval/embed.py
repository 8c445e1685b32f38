"""Embedding a set of images: decoded ahead in several threads, kept as it goes, taken up where it stopped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trainer.data.files import UnreadableImageError
from trainer.errors import TrainError
from trainer.evaluation.embed import BATCH
from trainer.retrieval.embeddings import read_embeddings, write_embeddings
from trainer.retrieval.images import Entry, Images, relative_place
from trainer.retrieval.model import Model

PART = 32  # batches that an interruption may lose when the machine dies
_NAMED = 100  # images that could not be read, in the file

Known = dict[Entry, np.ndarray]


@dataclass(frozen=True)
class Embedded:
    """What came of it: images in the file, how many of them were computed now, in which time, and which are missing."""

    images: int
    fresh: int
    seconds: float
    failed: dict[str, str]  # name → why


def embed_images(images: Images, model: Model, file: Path, overwrite: bool = False, strict: bool = False) -> Embedded:
    """Write the embeddings of all images to `file`, in their order.

    Of what the file, or an interrupted call, holds by the same student, only new and changed images are embedded. An
    image that cannot be read is left out, or with `strict` an error. Raises TrainError where the file is of another
    student or of other images, and `overwrite` is not given.
    """
    entries = images.entries()
    about = _describe(images, model, file)
    parts = file.with_name(file.name + ".parts")
    if overwrite:
        shutil.rmtree(parts, ignore_errors=True)
    known = {} if overwrite else _known(file, parts, about)
    wanted = [entry for entry in entries if entry not in known]
    failed: dict[str, str] = {}
    started = time.monotonic()
    fresh = 0
    for batch, vectors in _computed(images, model, wanted, parts, about, failed, strict):
        known.update(zip(batch, vectors, strict=True))
        fresh += len(batch)
    seconds = time.monotonic() - started
    kept = [entry for entry in entries if entry in known]
    if not kept:
        name, reason = next(iter(failed.items()))
        raise TrainError(f"none of the {len(entries)} images can be read, for example {name}: {reason}")
    lacking = {"count": len(failed), "images": dict(list(failed.items())[:_NAMED])}
    write_embeddings(file, {**about, "failed": lacking}, kept, np.stack([known[entry] for entry in kept]))
    shutil.rmtree(parts, ignore_errors=True)
    return Embedded(len(kept), fresh, seconds, failed)


def _describe(images: Images, model: Model, file: Path) -> dict[str, Any]:
    place = relative_place(model.path, file.parent)
    return {"model": {**model.describe(), "place": place}, "images": images.describe(file.parent)}


def _known(file: Path, parts: Path, about: dict[str, Any]) -> Known:
    known: Known = {}
    files = [file] if file.is_file() else []
    for each in [*files, *sorted(parts.glob("*.parquet"))]:
        held = read_embeddings(each)
        for what in ("model", "images"):
            wanted = {key: value for key, value in about[what].items() if what == "images" or key == "id"}
            if any(held.about[what].get(key) != value for key, value in wanted.items()):
                other = "by another student" if what == "model" else "of other images"
                raise TrainError(f"{file} holds embeddings {other}; give another --output, or --overwrite")
        known.update(zip(held.entries, held.vectors, strict=True))
    return known


def _computed(
    images: Images, model: Model, wanted: Sequence[Entry], parts: Path, about: dict[str, Any],
    failed: dict[str, str], strict: bool,
) -> Iterator[tuple[list[Entry], np.ndarray]]:  # fmt: skip
    """Yield entries and their embeddings batch by batch; whatever ends it, what was computed is in a part's file."""
    done: list[tuple[list[Entry], np.ndarray]] = []
    number = len(list(parts.glob("*.parquet")))

    def keep() -> None:
        nonlocal number
        if done:
            names = [entry for batch, _ in done for entry in batch]
            write_embeddings(parts / f"{number:06d}.parquet", about, names, np.concatenate([v for _, v in done]))
            number += 1
            done.clear()

    try:
        for entries, pictures in _loaded(images, model, wanted):
            good = []
            for entry, picture in zip(entries, pictures, strict=True):
                if isinstance(picture, np.ndarray):
                    good.append((entry, picture))
                elif strict:
                    raise TrainError(f"{entry.name}: {picture}")
                else:
                    failed[entry.name] = str(picture)
            if good:
                batch = [entry for entry, _ in good]
                vectors = model.embed([picture for _, picture in good])
                done.append((batch, vectors))
                yield batch, vectors
            if len(done) >= PART:
                keep()
    except BaseException:  # an interruption, too
        keep()
        raise


def _loaded(
    images: Images, model: Model, wanted: Sequence[Entry]
) -> Iterator[tuple[Sequence[Entry], list[np.ndarray | UnreadableImageError]]]:
    """Batches of images, the next one decoded while one is used."""
    batches = [wanted[start : start + BATCH] for start in range(0, len(wanted), BATCH)]
    with ThreadPoolExecutor(1, "ahead") as ahead, tqdm(total=len(wanted), unit="image", disable=None) as progress:
        coming = ahead.submit(images.load, batches[0], model) if batches else None
        for number, batch in enumerate(batches):
            assert coming is not None
            pictures = coming.result()
            if number + 1 < len(batches):
                coming = ahead.submit(images.load, batches[number + 1], model)
            yield batch, pictures
            progress.update(len(batch))

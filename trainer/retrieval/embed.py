"""Embedding a set of images: decoded ahead in several threads, kept as it goes, taken up where it stopped.

What is computed goes to files of a few thousand images beside the one that is made, and from there into that one in the
order of the images: neither holds all embeddings in memory.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from trainer.data.files import UnreadableImageError
from trainer.errors import TrainError
from trainer.evaluation.embed import BATCH
from trainer.retrieval.embeddings import ROWS, Block, Embeddings, read_embeddings, writing_embeddings
from trainer.retrieval.gallery import thumbnail
from trainer.retrieval.images import Entry, Images, relative_place
from trainer.retrieval.model import Model

PART = 32  # batches that an interruption may lose when the machine dies
_NAMED = 100  # images that could not be read, in the file
_GROUPS = 8  # row groups in memory while embeddings are put in order

Known = dict[Entry, tuple[Embeddings, int]]  # in which file an image's embedding is, and in which row


@dataclass(frozen=True)
class Embedded:
    """What came of it: images in the file, how many of them were computed now, in which time, and which are missing."""

    images: int
    fresh: int
    seconds: float
    failed: dict[str, str]  # name → why


def embed_images(
    images: Images,
    model: Model,
    file: Path,
    overwrite: bool = False,
    strict: bool = False,
    thumbnails: int | None = None,
) -> Embedded:
    """Write the embeddings of all images to `file`, in their order.

    Of what the file, or an interrupted call, holds by the same student, only new and changed images are embedded. An
    image that cannot be read is left out, or with `strict` an error. `thumbnails` also keeps each as the student sees
    it, as a JPEG of at most so many pixels a side. Raises TrainError where the file is of another student or of other
    images, and `overwrite` is not given.
    """
    entries = images.entries()
    about = {**_describe(images, model, file), "thumbnails": thumbnails}
    parts = file.with_name(file.name + ".parts")
    if overwrite:
        shutil.rmtree(parts, ignore_errors=True)
    before = [] if overwrite or not file.is_file() else [file]
    known = _known(file, [*before, *_files(parts)], about)
    wanted = [entry for entry in entries if entry not in known]
    failed: dict[str, str] = {}
    started = time.monotonic()
    fresh = sum(_computed(images, model, wanted, parts, about, failed, strict))
    seconds = time.monotonic() - started
    known = _known(file, [*before, *_files(parts)], about)
    kept = [entry for entry in entries if entry in known]
    if not kept:
        name, reason = next(iter(failed.items()))
        raise TrainError(f"none of the {len(entries)} images can be read, for example {name}: {reason}")
    lacking = {"count": len(failed), "images": dict(list(failed.items())[:_NAMED])}
    with writing_embeddings(file, {**about, "failed": lacking}, known[kept[0]][0].channels) as writer:
        for block in _ordered(kept, known):
            writer.write(block)
    shutil.rmtree(parts, ignore_errors=True)
    return Embedded(len(kept), fresh, seconds, failed)


def _describe(images: Images, model: Model, file: Path) -> dict[str, Any]:
    place = relative_place(model.path, file.parent)
    return {"model": {**model.describe(), "place": place}, "images": images.describe(file.parent)}


def _files(parts: Path) -> list[Path]:
    return sorted(parts.glob("*.parquet"))


def _known(file: Path, files: Sequence[Path], about: dict[str, Any]) -> Known:
    """What files hold of what `file` is to hold; those without the thumbnails that are wanted hold nothing of it."""
    known: Known = {}
    for each in files:
        held = read_embeddings(each)
        for what in ("model", "images"):
            wanted = {key: value for key, value in about[what].items() if what == "images" or key == "id"}
            if any(held.about[what].get(key) != value for key, value in wanted.items()):
                other = "by another student" if what == "model" else "of other images"
                raise TrainError(f"{file} holds embeddings {other}; give another --output, or --overwrite")
        if about["thumbnails"] in (None, held.thumbnails):
            known.update((entry, (held, row)) for row, entry in enumerate(held.entries))
    return known


def _ordered(kept: Sequence[Entry], known: Known) -> Iterator[Block]:
    """The embeddings of images in their order, from the files that they are in, which have about the same order."""

    @lru_cache(_GROUPS)
    def group(file: Path, number: int) -> Block:
        return held_in[file].block(number)

    held_in = {held.file: held for held, _ in known.values()}
    for start in range(0, len(kept), ROWS):
        entries = kept[start : start + ROWS]
        found = []
        for entry in entries:
            held, row = known[entry]
            number, place = held.number_of(row)
            block = group(held.file, number)
            found.append((block.vectors[place], block.thumbnails and block.thumbnails[place]))
        pictures = [picture for _, picture in found if picture]
        yield Block(entries, np.stack([vector for vector, _ in found]), pictures or None)


def _computed(
    images: Images, model: Model, wanted: Sequence[Entry], parts: Path, about: dict[str, Any],
    failed: dict[str, str], strict: bool,
) -> Iterator[int]:  # fmt: skip
    """Yield how many images of each batch are embedded; what was computed is in files of `parts`, whatever ends it."""
    done: list[Block] = []
    number = len(_files(parts))

    def keep() -> None:
        nonlocal number
        if done:
            with writing_embeddings(parts / f"{number:06d}.parquet", about, done[0].vectors.shape[1]) as writer:
                writer.write(_joined(done))
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
                vectors = model.embed([picture for _, picture in good])
                side = about["thumbnails"]
                small = [thumbnail(Image.fromarray(picture), side) for _, picture in good] if side else None
                done.append(Block([entry for entry, _ in good], vectors, small))
                yield len(good)
            if len(done) >= PART:
                keep()
    finally:  # an interruption, too
        keep()


def _joined(blocks: Sequence[Block]) -> Block:
    entries = [entry for block in blocks for entry in block.entries]
    pictures = [picture for block in blocks for picture in block.thumbnails or ()]
    return Block(entries, np.concatenate([block.vectors for block in blocks]), pictures or None)


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

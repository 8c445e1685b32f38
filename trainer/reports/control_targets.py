"""Targets that no teacher made, as caches that a control reads like features: pixels of the object, caption words.

Made from what a cache holds beside its features, for the same rows and views, and read by the same loader, so that
nothing but the target differs.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cache_schema import (
    Curriculum,
    DatasetInfo,
    Encoding,
    TapInfo,
    TeacherInfo,
    create_cache,
    fingerprint_samples,
    make_samples,
    plan_manifest,
)
from cache_schema.format.vocabulary import CROP_VIEW
from trainer.data.features import is_paired, tap_info
from trainer.errors import TrainError

if TYPE_CHECKING:
    from cache_schema import Cache

PIXELS, WORDS = "pixels", "words"  # what a control regresses, and the tap that holds it
TIMESTEP = 1  # the only one: nothing is noisy here
SIDE = 96  # pixels of the crop's longer side, about
MOST_WORDS = 512
_TRAINED_ON = ("train", "unlabeled")
_READ = (*_TRAINED_ON, "test")
_WORD = re.compile(r"[^\W\d_]{2,}")


@dataclass(frozen=True)
class _Target:
    """Tokens on a grid, and what makes those of a sample: its row → (V, L, C) float32."""

    grid: tuple[int, int]
    channels: int
    make: Callable[[int], np.ndarray]


def target_folder(output: Path, cache: Cache, kind: str) -> Path:
    """Where the targets of a kind for a cache are kept."""
    return (output / "targets" / f"{kind}-{cache.manifest.cache_id[:12]}").resolve()


def check_target(cache: Cache, kind: str) -> None:
    """Raise TrainError where a cache has nothing to make such targets of."""
    if kind == PIXELS and cache.manifest.images is None:
        raise TrainError(f"crop-pixels needs images, and cache {cache.manifest.label} holds none")
    if kind == WORDS:
        vocabulary(cache)


def make_target(cache: Cache, kind: str, folder: Path) -> None:
    """Make the targets of all rows with features, or what is missing of them; raises TrainError.

    Those of test images are for an embedding that reads them at test time, as the features it is held against.
    """
    check_target(cache, kind)
    views = [view for view in cache.manifest.views if is_paired(view)]
    target = _pixels(cache, views) if kind == PIXELS else _words(cache, views)
    rows = _rows(cache, _READ)
    samples, count = make_samples(cache.samples.take(rows).to_pylist(), _READ)
    manifest = plan_manifest(
        dataset=_dataset(cache, samples, count),
        teacher=TeacherInfo(
            family=kind,
            source=f"made from cache {cache.manifest.cache_id}, by no teacher",
            pipeline_class="None",
            digests={"cache": cache.manifest.cache_id},
            dtype="float32",
            resolution=SIDE,
            text="none",
        ),
        curriculum=Curriculum(num_steps=TIMESTEP, timesteps=[TIMESTEP], sigmas=[0.0], seed=0),
        taps=[TapInfo(name=kind, tokens=target.grid[0] * target.grid[1], channels=target.channels, grid=target.grid)],
        encoding=Encoding(kind="float16"),
        views=views,
        crops=cache.manifest.crops,
        images=None,
        image_rows=0,
    )
    writer = create_cache(folder, manifest, samples)
    for shard in writer.missing_shards():
        made = np.stack([target.make(int(rows[row])) for row in writer.shard_rows(shard)])  # (N, V, L, C)
        writer.write_shard(shard, {kind: made[:, :, None]})
    writer.seal()


def vocabulary(cache: Cache) -> list[str]:
    """The words that tell captions apart, the most frequent first; raises TrainError where there are none.

    A word of all captions or of one alone tells nothing of the others.
    """
    trained_on = _rows(cache, _TRAINED_ON)
    captions = [str(caption or "") for caption in cache.samples["caption"].take(trained_on).to_pylist()]
    counts = Counter(word for caption in captions for word in _words_of(caption))
    kept = [word for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    kept = [word for word in kept if 1 < counts[word] < len(captions)][:MOST_WORDS]
    if not kept:
        said = f"all of them read {captions[0]!r}" if len(set(captions)) == 1 else "no word is in several but not all"
        said = "it has no captions" if not any(captions) else said
        raise TrainError(
            f"caption-words needs captions that tell images apart, and those of cache {cache.manifest.label} do not: "
            f"{said}; annotate the images with dit-cache annotate, or leave the variant out"
        )
    return kept


def _rows(cache: Cache, of: Collection[str]) -> np.ndarray:
    """Rows of some splits that have features."""
    splits = cache.samples["split"].to_pylist()
    usable = [row for row, split in enumerate(splits) if split in of and cache.has_features(row)]
    return np.array(usable, dtype=np.int64)


def _words_of(caption: str) -> set[str]:
    return set(_WORD.findall(caption.lower()))


def _words(cache: Cache, views: list[str]) -> _Target:
    """1 for each word that is in a sample's caption, in any view: (V, 1, K)."""
    places = {word: place for place, word in enumerate(vocabulary(cache))}
    captions = cache.samples["caption"]

    def make(row: int) -> np.ndarray:
        bag = np.zeros((len(views), 1, len(places)), np.float32)
        bag[:, :, [places[word] for word in _words_of(str(captions[row].as_py() or "")) if word in places]] = 1
        return bag

    return _Target((1, 1), len(places), make)


def _pixels(cache: Cache, views: list[str]) -> _Target:
    """The object's crop of the stored image in patches, on the grid of the teacher's tokens: (V, L, 3·p²) in ±1."""
    rows, columns = tap_info(cache, cache.manifest.default_tap).grid
    patch = max(1, round(SIDE / max(rows, columns)))

    def make(row: int) -> np.ndarray:
        image = Image.open(io.BytesIO(cache.images([row])[0])).convert("RGB")
        size = columns * patch, rows * patch
        boxes = [_view_box(cache, row, image, view) for view in views]
        crops = [np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box), np.float32) for box in boxes]
        mirrored = [crop[:, ::-1] if view == "hflip" else crop for view, crop in zip(views, crops, strict=True)]
        seen = np.stack(mirrored) / 127.5 - 1  # (V, H, W, 3)
        patches = seen.reshape(len(views), rows, patch, columns, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        return patches.reshape(len(views), rows * columns, patch * patch * 3)

    return _Target((rows, columns), 3 * patch * patch, make)


def _view_box(cache: Cache, row: int, image: Image.Image, view: str) -> tuple[float, float, float, float] | None:
    """What a view shows of the stored image: a random crop, or the object."""
    if not view.startswith(CROP_VIEW):
        return _object_box(cache, row, image)
    left, top, right, bottom = cache.crops[row, int(view.removeprefix(CROP_VIEW))] * np.tile(image.size, 2)
    return float(left), float(top), float(right), float(bottom)


def _object_box(cache: Cache, row: int, image: Image.Image) -> tuple[float, float, float, float] | None:
    """A sample's box on its stored image, of another size than the photograph; None where it has no box."""
    sample: dict[str, Any] = cache.samples.slice(row, 1).to_pylist()[0]
    if sample["box"] is None:
        return None
    sides = np.tile([sample["width"], sample["height"]], 2)
    left, top, right, bottom = np.clip(np.asarray(sample["box"]) / sides, 0, 1) * np.tile(image.size, 2)
    return float(left), float(top), float(right), float(bottom)


def _dataset(cache: Cache, samples: Any, feature_rows: int) -> DatasetInfo:
    about, counts = cache.manifest.dataset, Counter(samples["split"].to_pylist())
    return DatasetInfo(
        name=about.name,
        protocol=about.protocol,
        fingerprint=fingerprint_samples(samples),
        superclass=about.superclass,
        counts=dict(counts),
        feature_splits=[split for split in _READ if counts[split]],
        feature_rows=feature_rows,
    )

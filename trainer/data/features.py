"""The teacher features that a method needs, from one cache or several, for the samples of the run's own cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from cache_schema.format.vocabulary import CROP_VIEW
from cache_schema.reading.batch import TORCH_DTYPES
from trainer.config import UnlabelledFrom
from trainer.errors import TrainError

if TYPE_CHECKING:
    from cache_schema import Cache
    from cache_schema.format.manifest import TapInfo

# The views whose student image can be made from the stored one; those that show all of it.
WHOLE_VIEWS = ("canonical", "hflip")
_SHOWN = 4  # sample ids in a line for people


def sample_ids(cache: Cache, rows: np.ndarray) -> list[str]:
    """The ids of a cache's rows."""
    return [str(name) for name in cache.samples["id"].take(rows).to_pylist()]


def not_finite(values: Tensor) -> Tensor:
    """Which rows of (n, …) hold anything that is not finite: (n,) bool, on the CPU."""
    return ~values.isfinite().flatten(1).all(1).cpu()


def some_of(ids: list[str]) -> str:
    """Samples by their ids, as a line for people names them."""
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"sample{'s' if len(ids) > 1 else ''} {', '.join(map(repr, ids[:_SHOWN]))}{more}"


def is_paired(view: str) -> bool:
    """Whether a view's student image can be made from the stored one: of random crops the cache has the boxes."""
    return view in WHOLE_VIEWS or view.startswith(CROP_VIEW)


@dataclass(frozen=True)
class FeatureNeed:
    """One tap at some timesteps (None: all that there are), of the run's own cache or of another (path or URL).

    tap: None is `hidden` where the cache has it, otherwise its first.
    """

    tap: str | None
    timesteps: tuple[int, ...] | None = None
    cache: str | None = None
    next_view: bool = False  # of the same sample in the next of the run's views, not in the view of its image
    shuffled: int | None = None  # a control: each sample is given another's of its split, by this seed


@dataclass(frozen=True)
class Needs:
    """What a method reads beside labelled images: features by a name of its choice, unlabelled rows per batch."""

    features: Mapping[str, FeatureNeed] = field(default_factory=dict)
    unlabelled: int = 0
    unlabelled_from: UnlabelledFrom = "unlabeled"  # training images among them are not in the view of a labelled row
    unlabelled_settings: tuple[str, str] = ("unlabeled_per_batch", "unlabeled_from")  # that say the two, for advice
    places: bool = False  # features are compared with what the student sees at the same place of the picture
    timesteps_per_step: int | None = None  # drawn for each image at each update, of all features alike; None: all
    # Means are taken off the features, of which little may be left: rounded to bfloat16 before, it would be noise.
    exact: bool = False
    fit_on: Literal["few", "all"] = "few"  # what `fit` is to measure: a few batches, or the features of every row


@dataclass(frozen=True)
class FeatureShape:
    """A need as a cache meets it: features are (N, P, L, C_t) with P = len(timesteps)."""

    timesteps: tuple[int, ...]
    tokens: int  # L
    channels: int  # C_t
    grid: tuple[int, int]  # how the L tokens lie: rows, columns
    tap: str = ""  # its name


class FeatureSource:
    """The features of one need, asked for by the rows of the run's own cache.

    Another cache may hold its samples in another order, and others beside them: a sample is the same where its id and
    the SHA-256 of its file are, or, where the id is not there, where the SHA-256 alone is.
    """

    def __init__(self, own: Cache, cache: Cache, need: FeatureNeed):
        info = tap_info(cache, need.tap or cache.manifest.default_tap)
        self.cache, self.tap, self.next_view = cache, info.name, need.next_view
        timesteps = choose_timesteps(cache, need.timesteps)
        self.shape = FeatureShape(timesteps, info.tokens, info.channels, info.grid, self.tap)
        self._row_of = None if cache is own else match_samples(own, cache)
        self._same = self._row_of  # the row of the same sample, whoever's features it is given
        if need.shuffled is not None:
            identity = np.arange(len(own.samples))
            self._row_of = (identity if self._row_of is None else self._row_of)[_shuffled(own, need.shuffled)]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows of this source's cache for rows of the run's own, -1 where the sample is not there."""
        return rows if self._row_of is None else self._row_of[rows]

    def rows_of_same(self, rows: np.ndarray) -> np.ndarray:
        """Rows of this source's cache that are the same samples, whoever's features they are given; -1: not there."""
        return rows if self._same is None else self._same[rows]

    def row_bytes(self, timesteps: int | None = None) -> int:
        """Bytes of an image's features as they are encoded, without their scales, at so many timesteps or at all."""
        shape, kind = self.shape, self.cache.manifest.encoding.kind
        return (timesteps or len(shape.timesteps)) * shape.tokens * shape.channels * TORCH_DTYPES[kind].itemsize

    def has_features(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows have features here: (n,) bool."""
        return np.array([row >= 0 and self.cache.has_features(int(row)) for row in self.rows(rows)], dtype=bool)

    @property
    def how_to_check(self) -> str:
        """What to do about features that cannot be what was written."""
        return f"hold the cache against its checksums with dit-cache verify {self.cache.root}"

    def require(self, own: Cache, rows: np.ndarray) -> None:
        """Raise TrainError, with an example, where rows of the run's own cache have no features here."""
        lacking = rows[~self.has_features(rows)]
        if len(lacking):
            example = own.samples["id"][int(lacking[0])].as_py()
            raise TrainError(
                f"{_name(self.cache)} lacks features of {len(lacking)} of the {len(rows)} samples of "
                f"{own.manifest.label} that are trained on, for example {example!r}; build them there as well"
            )

    def require_crops(self, own: Cache, views: tuple[str, ...]) -> None:
        """Raise TrainError where a random crop is another here: its features are not those of the student's image."""
        if self._same is None:
            return
        rows = np.flatnonzero(self._same >= 0)
        for view in (view for view in views if view.startswith(CROP_VIEW)):
            number = int(view.removeprefix(CROP_VIEW))
            ours, theirs = own.crops[rows, number], self.cache.crops[self._same[rows], number]
            # Quarantined images have none, and are not trained on.
            differing = ((ours != theirs) & np.isfinite(ours) & np.isfinite(theirs)).any(1)
            if differing.any():
                example = own.samples["id"][int(rows[differing.argmax()])].as_py()
                raise TrainError(
                    f"{_name(self.cache)} and {_name(own)} have other crops: {view} of {example!r} shows another part; "
                    f"train without (views={','.join(WHOLE_VIEWS)}), or build both with the same seed, crops and boxes"
                )


def open_sources(own: Cache, needs: Needs) -> dict[str, FeatureSource]:
    """Open all that a method needs, by its names; raises TrainError that says what a cache lacks.

    Other caches are read as the run's own is: held against their checksums or not, with as much of them kept here.
    """
    from cache_schema import open_cache

    opened: dict[str | None, Cache] = {None: own}
    for need in needs.features.values():
        if need.cache not in opened:
            opened[need.cache] = open_cache(str(need.cache), verify=own.verify, local_cache=own.local_cache)
    return {name: FeatureSource(own, opened[need.cache], need) for name, need in needs.features.items()}


def choose_timesteps(cache: Cache, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """The run's timesteps: those asked for, or all; raises TrainError that says what the cache has."""
    have = tuple(cache.manifest.curriculum.timesteps)
    lacking = [t for t in wanted or () if t not in have]
    if lacking:
        raise TrainError(f"{_name(cache)} lacks timestep {_list(lacking)} (has {_list(have)})")
    return tuple(wanted) if wanted else have


def choose_views(cache: Cache, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The run's views: those asked for, or all that can be paired; raises TrainError that says what there is."""
    have = tuple(cache.manifest.views)
    lacking = [view for view in wanted or () if view not in have]
    if lacking:
        raise TrainError(f"{_name(cache)} lacks view {_list(lacking)} (has {_list(have)})")
    unpaired = [view for view in wanted or () if not is_paired(view)]
    if unpaired:
        raise TrainError(f"view {_list(unpaired)} cannot be paired with a student image; use {_list(WHOLE_VIEWS)}")
    views = tuple(wanted) if wanted else tuple(view for view in have if is_paired(view))
    if not views:
        raise TrainError(f"{_name(cache)} has no view to train on (has {_list(have)})")
    return views


def shared_views(own: Cache, sources: Mapping[str, FeatureSource], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """Views that every cache of the run has; raises TrainError for one asked for that is not everywhere."""
    views = choose_views(own, wanted)
    for source in sources.values():
        offered = choose_views(source.cache, wanted)
        views = tuple(view for view in views if view in offered)
        if not views:
            raise TrainError(f"{_name(source.cache)} and {_name(own)} have no view in common")
    for source in sources.values():
        source.require_crops(own, views)
    return views


def tap_info(cache: Cache, tap: str) -> TapInfo:
    """What a cache says of a tap; raises TrainError that says which taps there are."""
    taps = {info.name: info for info in cache.manifest.taps}
    if tap not in taps:
        raise TrainError(f"{_name(cache)} lacks tap {tap} (has {_list(taps)})")
    return taps[tap]


def _shuffled(own: Cache, seed: int) -> np.ndarray:
    """(rows of `own`,) int64: for each row with features another one of its split, the others in their place.

    Raises TrainError where a split has no other one.
    """
    rows, random = np.arange(len(own.samples)), np.random.Generator(np.random.Philox(key=seed))
    has_features = np.array([own.has_features(row) for row in rows.tolist()], dtype=bool)
    splits = np.array(own.samples["split"].to_pylist())
    for split in sorted(set(splits[has_features].tolist())):
        order = random.permutation(rows[has_features & (splits == split)])
        if len(order) < 2:
            raise TrainError(
                f"shuffle_features: one image of split {split} has features in {_name(own)}, and there is no other to "
                "take them of"
            )
        rows[order] = np.roll(order, 1)  # round one circle, so that none comes to itself
    return rows


def match_samples(own: Cache, other: Cache) -> np.ndarray:
    """(rows of `own`,) int64: the row of the same sample in `other`, or -1; raises TrainError where ids disagree."""
    ids, hashes = other.samples["id"].to_pylist(), other.samples["sha256"].to_pylist()
    by_id = {name: row for row, name in enumerate(ids)}
    by_hash = {digest: row for row, digest in reversed(list(enumerate(hashes)))}
    rows = np.full(len(own.samples), -1, dtype=np.int64)
    pairs = zip(own.samples["id"].to_pylist(), own.samples["sha256"].to_pylist(), strict=True)
    for row, (name, digest) in enumerate(pairs):
        found = by_id.get(name)
        if found is not None and hashes[found] != digest:
            raise TrainError(
                f"sample {name!r} is another image in {_name(other)} than in {_name(own)}: "
                "the caches were not built from the same data"
            )
        rows[row] = by_hash.get(digest, -1) if found is None else found
    return rows


def _name(cache: Cache) -> str:
    return f"cache {cache.manifest.label}"


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)

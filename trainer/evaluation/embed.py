"""Embeddings of the images to be scored: the student's own, and what a method offers beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.features import FeatureSource, Needs, not_finite, open_sources, sample_ids, some_of
from trainer.data.images import Fit, ImageStore
from trainer.data.splits import Split, hold_out_classes, select_split
from trainer.device import full_precision
from trainer.errors import TrainError
from trainer.models.student import Student

if TYPE_CHECKING:
    from cache_schema import Cache

BATCH = 64  # images
_FEWEST = 4  # embeddings that can be called all the same
_SAME = 1e-6  # more than rounding moves equal embeddings apart, which are computed in float32


class UntellingError(TrainError):
    """Embeddings that are nearly all the same: there are no neighbours to speak of."""


class Auxiliary(Protocol):
    """What offers embeddings beside the student's: they read the teacher's cached features of the scored images."""

    needed: Needs

    @property
    def auxiliary_names(self) -> Mapping[str, str]:
        """Name of each embedding → what a reader is told it is."""

    @property
    def auxiliary_timesteps(self) -> tuple[int, ...]:
        """The timesteps along axis P of embeddings (N, P, C)."""

    @property
    def made_of_teacher(self) -> str | None:
        """Which of `auxiliary_names` is made of the teacher's features alone, or nearly so."""

    @property
    def scored(self) -> str:
        """The embedding that a run is scored by: "student", or one of `auxiliary_names`."""

    def auxiliary(self, student: Tensor, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """E_R (n, C) and features (n, P, L, C_t) by name → embeddings (n, P, C) or (n, C) by name."""

    def eval(self) -> object:
        """Switch off what is random."""


class Pictures(Protocol):
    """The pixels of the images to be scored."""

    def load(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """The images of rows at the student's size: (B, 3, S, S) uint8."""


class Scored(Protocol):
    """Images to be scored, wherever they come from."""

    @property
    def split(self) -> Split:
        """Their rows and labels."""

    @property
    def images(self) -> Pictures:
        """Their pixels, by row."""

    @property
    def labels(self) -> Tensor:
        """The labels of `split`."""

    @property
    def ids(self) -> list[str]:
        """What each is called."""

    @property
    def class_names(self) -> list[str]:
        """The name of each one's class, "" where it has none."""


@dataclass(frozen=True)
class TestSplit:
    """What an evaluation needs, kept between the evaluations of one run: rows, labels, decoded images."""

    cache: Cache
    split: Split
    images: ImageStore
    sources: Mapping[str, FeatureSource] | None = None  # that are open already

    __test__ = False  # not a pytest class

    @property
    def labels(self) -> Tensor:
        return torch.from_numpy(self.split.labels)

    @property
    def ids(self) -> list[str]:
        return sample_ids(self.cache, self.split.rows)

    @property
    def class_names(self) -> list[str]:
        return self.cache.samples["class_name"].take(self.split.rows).to_pylist()


def open_test_split(
    cache: Cache, image_size: int, memory_gb: float | None = None, split: str = "test", fit: Fit = "squash"
) -> TestSplit:
    """Choose the rows to evaluate; raises TrainError when the cache has none."""
    rows = select_split(cache, split, need_features=False)
    if not len(rows.rows):
        raise TrainError(f"cache {cache.manifest.label} has no rows of split {split!r} to evaluate on")
    return open_rows(cache, rows, image_size, memory_gb, fit)


def open_validation_split(
    cache: Cache, share: float, image_size: int, memory_gb: float | None = None, fit: Fit = "squash"
) -> TestSplit:
    """The rows of the training classes that a run holds out; raises TrainError when it holds none out."""
    if not share:
        raise TrainError("the run held no classes out; train it with --validation-classes 0.2 to have some")
    _, held = hold_out_classes(select_split(cache, "train", need_features=True), share)
    return open_rows(cache, held, image_size, memory_gb, fit)


def open_rows(
    cache: Cache,
    split: Split,
    image_size: int,
    memory_gb: float | None = None,
    fit: Fit = "squash",
    sources: Mapping[str, FeatureSource] | None = None,
) -> TestSplit:
    """Rows that are known already, to be evaluated, maybe with features from `sources` that are open already."""
    return TestSplit(cache, split, ImageStore(cache, image_size, split.rows, memory_gb, fit), sources)


@torch.inference_mode()
def embed_students(student: Student, test: Scored, device: torch.device) -> Tensor:
    """E_R of every test image: (N, C) float32 on the CPU."""
    student.eval()
    found = []
    for rows in _chunks(test.split.rows):
        with full_precision(device):
            found.append(student(test.images.load(rows).to(device)).float().cpu())
    embeddings = torch.cat(found)
    refuse_untelling(embeddings, "the student")
    return embeddings


@torch.inference_mode()
def embed_auxiliary(auxiliary: Auxiliary, student: Tensor, test: TestSplit, device: torch.device) -> dict[str, Tensor]:
    """What `auxiliary` makes of E_R (N, C) and the test images' features: by name, (N, P, C) or (N, C).

    Empty where it offers nothing, or where not every test image has the features it needs.
    """
    sources = feature_sources(auxiliary, test)
    if sources is None:
        return {}
    auxiliary.eval()
    found: dict[str, list[Tensor]] = {name: [] for name in auxiliary.auxiliary_names}
    for at, rows in zip(_chunks(np.arange(len(student))), _chunks(test.split.rows), strict=True):
        features = {name: read_features(source, rows, device) for name, source in sources.items()}
        with full_precision(device):
            embedded = auxiliary.auxiliary(student[at].to(device), features)
        for name, parts in found.items():
            parts.append(embedded[name].float().cpu())
    embeddings = {name: torch.cat(parts) for name, parts in found.items()}
    for name, part in embeddings.items():
        refuse_untelling(part, auxiliary.auxiliary_names[name])
    return embeddings


def refuse_untelling(embeddings: Tensor, whose: str) -> None:
    """Raise TrainError for embeddings (N, …, C) that are not finite, UntellingError where over half are the same.

    Neighbours among equals are those that come first in the cache, class by class: their score would look good.
    """
    N = len(embeddings)
    broken = int(not_finite(embeddings).sum())
    if broken:
        raise TrainError(
            f"{broken} of {N} embeddings of {whose} are not finite, so they cannot be scored; their values overflow: "
            "train again with a lower --lr"
        )
    if N < _FEWEST:
        return
    unit = F.normalize(embeddings.double(), dim=-1).flatten(1)
    # Equal embeddings are equally far along any direction, and others hardly ever.
    direction = torch.randn(unit.shape[1], dtype=unit.dtype, generator=torch.Generator().manual_seed(0))
    along = (unit @ direction).sort().values
    half = N // 2
    if bool((along[half:] - along[: N - half] < _SAME).any()):
        raise UntellingError(
            f"more than half of the {N} embeddings of {whose} are the same, so they cannot be scored: it tells no "
            "image from another; train again with a lower --lr, or look at its weights"
        )


def feature_sources(auxiliary: Auxiliary, test: TestSplit) -> dict[str, FeatureSource] | None:
    """Where the features that `auxiliary` reads are; None unless every test image has all of them."""
    if not auxiliary.auxiliary_names:
        return None
    if test.sources is None:
        sources = open_sources(test.cache, auxiliary.needed)
    else:
        sources = {name: test.sources[name] for name in auxiliary.needed.features}
    for source in sources.values():
        # The stored images are the canonical view; features of another view would be of other pixels.
        if "canonical" not in source.cache.manifest.views or not source.has_features(test.split.rows).all():
            return None
    return sources


def read_features(source: FeatureSource, rows: np.ndarray, device: torch.device) -> Tensor:
    """The features of rows of the run's cache, in the view that the stored images are of: float32 (n, P, L, C_t).

    Raises TrainError, with the samples, where they are not finite: whatever is made of them would look like a poor
    teacher, or like a method that diverged.
    """
    there, timesteps = source.rows(rows), list(source.shape.timesteps)
    encoded = source.cache.read(there.tolist(), tap=source.tap, timesteps=timesteps, view="canonical")
    with full_precision(device):
        features = encoded.decode(device=device, dtype=torch.float32)
    broken = not_finite(features).numpy()
    if broken.any():
        samples = some_of(sample_ids(source.cache, there[broken]))
        raise TrainError(f"the cached features {source.tap!r} of {samples} are not finite; {source.how_to_check}")
    return features


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(values), BATCH):
        yield values[start : start + BATCH]

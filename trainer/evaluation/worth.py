"""What a teacher is worth to a student: how well each of the two tells images apart before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.features import FeatureSource
from trainer.data.splits import Split
from trainer.evaluation.embed import TestSplit, UntellingError, embed_students, refuse_untelling
from trainer.evaluation.evaluate import average_timesteps
from trainer.evaluation.frozen import pooled_features
from trainer.evaluation.intervals import paired_class_bootstrap
from trainer.evaluation.metrics import score_queries
from trainer.models.components import PrincipalComponents
from trainer.models.student import Student

MOST = 2048  # images that are looked at
COMPONENTS = 256


@dataclass(frozen=True)
class Worth:
    """R@1 of the teacher's features as they are and of the student as it starts, in 0..1, on training images.

    Neither has learnt from their labels yet. `low` and `high`: the 95 % interval over classes of teacher − student.
    """

    teacher: float
    student: float
    low: float
    high: float

    @property
    def followed(self) -> bool:
        """Whether the teacher is not surely behind the student."""
        return self.high >= 0

    def as_json(self) -> dict[str, Any]:
        """What a run's result says of it."""
        return {**asdict(self), "followed": self.followed}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Worth:
        """Undo `as_json` or `dataclasses.asdict`."""
        return cls(**{name: value for name, value in values.items() if name != "followed"})

    def __str__(self) -> str:
        return (
            f"R@1 of training images is {100 * self.teacher:.1f} % by the teacher's features as they are, "
            f"{100 * self.student:.1f} % by the student as it starts"
        )


def not_followed(result: Mapping[str, Any]) -> str | None:
    """Why the run that a result is of did not follow its teacher; None where it did, or has none."""
    worth = result.get("worth")
    if worth is None or worth["followed"]:
        return None
    return f"not followed, the run is that of method {result['method']}: {Worth.from_json(worth)}"


@torch.inference_mode()
def measure_worth(student: Student, source: FeatureSource, seen: TestSplit, device: torch.device) -> Worth | None:
    """Compare the teacher's features with the student's embedding on (some of) the images of `seen`.

    Each is taken as it is or by its half-whitened principal components, whichever finds more: raw features of a large
    network have a few channels that decide every cosine. None where features in the canonical view are lacking.
    """
    if "canonical" not in source.cache.manifest.views:
        return None
    step = -(-len(seen.split.rows) // MOST)
    rows, labels = seen.split.rows[::step], seen.split.labels[::step]
    if not source.has_features(rows).all():
        return None
    chosen = TestSplit(seen.cache, Split(rows, labels, seen.split.classes), seen.images)
    own = _hits(lambda: embed_students(student, chosen, device).unsqueeze(1), chosen.labels, device)
    theirs = _hits(lambda: _pooled(source, rows, device), chosen.labels, device)
    found = paired_class_bootstrap(theirs, own, labels)
    return Worth(float(theirs.mean()), float(own.mean()), found.low, found.high)


def _pooled(source: FeatureSource, rows: np.ndarray, device: torch.device) -> Tensor:
    """Means over tokens: (N, P, C_t)."""
    pooled = torch.cat([part for _, part in pooled_features(source, rows, device)])
    refuse_untelling(pooled.cpu(), "the teacher")
    return pooled


def _hits(embed: Callable[[], Tensor], labels: Tensor, device: torch.device) -> np.ndarray:
    """For each image, 0 or 1, whether the nearest other one is of its class, by embeddings (N, P, C); (N,)."""
    try:
        embeddings = embed().to(device)
    except UntellingError:  # most of them are one and the same: their neighbours would be an accident
        return np.zeros(len(labels))
    P, C = embeddings.shape[1:]
    components = PrincipalComponents(P, C, min(COMPONENTS, C)).to(device)
    components.fit([embeddings.unsqueeze(2)])
    forms = embeddings, components(embeddings.unsqueeze(2)).squeeze(2)
    found = [score_queries(average_timesteps(form), labels.to(device))[0]["recall_at_1"] for form in forms]
    return max(found, key=lambda hits: float(hits.mean())).cpu().numpy()

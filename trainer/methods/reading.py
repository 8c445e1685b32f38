"""What methods that read the teacher's features have in common; their settings are in `teacher_config`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from trainer.data.batch import Batch
from trainer.data.features import FeatureNeed
from trainer.methods.teacher_config import ReadingConfig

TEACHER = "teacher"  # the name of the features that are read


def teacher_need(config: ReadingConfig) -> dict[str, FeatureNeed]:
    """What is to be read, under the name `TEACHER`."""
    shuffled = config.seed if config.shuffle_features else None
    return {TEACHER: FeatureNeed(config.tap, config.timesteps, config.features, shuffled=shuffled)}


class TeacherFeatures:
    """The teacher's features of batches, (B, P, L, C_t) each, as often as they are asked for."""

    def __init__(self, batches: Iterable[Batch]):
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.features[TEACHER] for batch in self.batches)

"""Which of the curriculum's timesteps each image has at an update, where a run does not take all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cache_schema.loading.sampler import TIMESTEPS, generator
from trainer.data.features import FeatureSource
from trainer.errors import TrainError


@dataclass(frozen=True)
class TimestepDraw:
    """`each` of `count` timesteps for every image: a pure function of the seed and the update, so that a run resumes.

    Source of the idea: one noise level for each image and step, as diffusion models are trained (Ho et al., "Denoising
    Diffusion Probabilistic Models", NeurIPS 2020); the mean over updates is that over all timesteps.
    """

    each: int
    count: int
    seed: int

    @classmethod
    def of(cls, sources: Iterable[FeatureSource], each: int | None, seed: int) -> TimestepDraw | None:
        """What a run draws of its features, None where it takes all; raises TrainError where there are not so many."""
        counts = {len(source.shape.timesteps) for source in sources}
        if each is None or not counts:
            return None
        if len(counts) > 1:
            raise TrainError("timesteps_per_step: the features read are of different numbers of timesteps")
        (count,) = counts
        if each > count:
            raise TrainError(f"timesteps_per_step: {each} cannot be drawn of the run's {count} timesteps")
        return None if each == count else cls(each, count, seed)

    def draw(self, update: int, images: int) -> np.ndarray:
        """(images, each) int64, ascending; those of the first images do not depend on how many follow."""
        random = generator(self.seed, TIMESTEPS, update).random((images, self.count))
        return np.sort(random.argsort(1)[:, : self.each], axis=1)

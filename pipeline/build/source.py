"""What computes the features of a build: chosen by the kind of teacher."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from pipeline.build.config import BuildConfig
from pipeline.datasets.base import Dataset
from pipeline.inputs.condition_store import ConditionStore
from pipeline.inputs.conditions import WHOLE
from pipeline.inputs.feature_source import DiffusionSource, EncoderSource, FeatureSource, Wanted
from pipeline.inputs.framing import Framing
from pipeline.teachers.base import AnyTeacher, Teacher, input_of, is_image_encoder
from pipeline.teachers.passes import Passes


def framing_of(teacher: AnyTeacher, config: BuildConfig) -> Framing:
    """Which parts of photographs a build shows the teacher."""
    return Framing(input_of(teacher), config.seed, config.crops_scale, config.crops_ratio, teacher.crop)


def wanted_of(config: BuildConfig, sigmas: Sequence[float], framing: Framing = WHOLE) -> Wanted:
    """The features of one image that a build caches; sigmas: the noise levels of its timesteps."""
    return Wanted(config.taps, config.views, tuple(sigmas), config.seed, framing)


def source_for(
    teacher: AnyTeacher,
    dataset: Dataset,
    config: BuildConfig,
    sigmas: Sequence[float],
    conditions: Path,
    passes: Passes | None = None,
) -> FeatureSource:
    """The source of a build's features.

    conditions: folder of the `ConditionStore` of a diffusion transformer. passes: how batches are cut into forward
    passes; None takes each as one.
    """
    wanted = wanted_of(config, sigmas, framing_of(teacher, config))
    if is_image_encoder(teacher):
        return EncoderSource(teacher, dataset, wanted, passes)
    diffusion = cast(Teacher, teacher)
    store = ConditionStore(
        conditions, diffusion, dataset, use_captions=config.text == "caption", framing=wanted.framing
    )
    return DiffusionSource(diffusion, store, wanted, passes)

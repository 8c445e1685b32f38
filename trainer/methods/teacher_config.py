"""Settings of methods that read the teacher's features."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cache_schema.fields import Setting
from trainer.config import TrainConfig, UnlabelledFrom

TimestepsPerStep = Annotated[
    int | None, Setting("Timesteps drawn anew for each image at each update, of those above; all by default.")
]


class ReadingConfig(TrainConfig):
    """A run that reads features: which ones."""

    features: Annotated[
        str | None, Setting("Another cache to read them from, of the same images: a folder or a URL.")
    ] = None
    tap: str | None = None  # None: hidden where the cache has it, otherwise its first
    timesteps: tuple[int, ...] | None = None  # None: all that the cache has
    shuffle_features: Annotated[
        bool, Setting("A control: every image is given the features of another one of its split.")
    ] = False


class FollowingConfig(ReadingConfig):
    """A run whose student learns from features what they know, and does without them afterwards."""

    follow: Annotated[
        Literal["always", "auto"],
        Setting(
            "auto: before the first update, training images are looked up by the teacher's features and by the "
            "student; where the teacher finds surely less, the student is trained without it, as by method baseline."
        ),
    ] = "always"
    unlabeled_per_batch: Annotated[
        int, Setting("Extra rows per batch, of which nothing is learnt but the features.")
    ] = Field(default=0, ge=0)
    unlabeled_from: Annotated[
        UnlabelledFrom, Setting("Where extra rows are from: the split, the training images in another view, or both.")
    ] = "unlabeled"

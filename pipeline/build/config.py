"""What a cache build computes and stores, as one typed value. Nothing heavy: command line options are made from it."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from cache_schema.errors import DitDistillError
from cache_schema.fields import Setting, check_limits
from cache_schema.format.vocabulary import (
    DEFAULT_MASSIVE_FACTOR,
    Compression,
    EncodingKind,
    ImageShape,
    MassiveChannels,
    StoreKind,
    TextCondition,
)
from pipeline.curriculum import DEFAULT_STEPS, DEFAULT_TIMESTEPS, check_timesteps
from pipeline.datasets.base import SPLITS
from pipeline.inputs.framing import DEFAULT_RATIO, DEFAULT_SCALE
from pipeline.inputs.views import expand_views, is_crop

AUTO_BATCH = 32


def read_batch(text: str) -> int | Literal["auto"]:
    """A number of images or auto. Raises ValueError."""
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise ValueError(f"{text!r} is neither a number of images nor auto")
    return int(text)


@dataclass(frozen=True)
class BuildConfig:
    """What to cache and how. taps, timesteps, views and splits as in the manifest.

    batch: images per forward pass, each at all timesteps; "auto" begins with AUTO_BATCH and halves the pass on
    out-of-memory, down to one image at one timestep. min_cosine: per tap and timestep; None accepts any.
    """

    taps: Annotated[
        tuple[str, ...],
        Setting("Where features are read: hidden, velocity, double.N, single.N, double.N.modulated."),
    ] = ("hidden",)
    timesteps: Annotated[tuple[int, ...], Setting("Curriculum P.")] = DEFAULT_TIMESTEPS
    num_steps: Annotated[int, Setting("Length T of the scheduler; 1 is the noisiest step, T the clearest.")] = (
        DEFAULT_STEPS
    )
    views: Annotated[
        tuple[str, ...],
        Setting("Of canonical, hflip and crops:K, K random crops of each image; each view gets features of its own."),
    ] = ("canonical",)
    crops_scale: Annotated[
        tuple[float, float],
        Setting("Share that crops have of the area the teacher sees otherwise, from least to most."),
    ] = DEFAULT_SCALE
    crops_ratio: Annotated[tuple[float, float], Setting("Width to height of crops, from least to most.")] = (
        DEFAULT_RATIO
    )
    feature_splits: Annotated[
        tuple[str, ...], Setting("Splits that get features: train, unlabeled, test.", option="--features")
    ] = ("train", "unlabeled")
    store: Annotated[StoreKind, Setting("Zarr v3 arrays, or WebDataset tar files.")] = "zarr"
    encoding: Annotated[EncodingKind, Setting("Number format in which features are stored.")] = "int8"
    pool: Annotated[int, Setting("Store the mean over N × N tokens.", least=1, most=64)] = 1
    pca: Annotated[int | None, Setting("Store the K strongest principal components.", least=1)] = None
    massive_channels: Annotated[
        MassiveChannels,
        Setting("The few channels that are many times larger than the others: keep, remove (zeros), standardize."),
    ] = "keep"
    massive_factor: Annotated[
        float, Setting("A channel is massive from so many times the median of the channels on.", above=1)
    ] = DEFAULT_MASSIVE_FACTOR
    compression: Annotated[Compression, Setting("Lossless compression of the stored bytes.")] = "none"
    min_cosine: Annotated[
        float | None,
        Setting(
            "Refuse a cache whose mean cosine to the teacher is below this, e.g. 0.995.",
            least=-1, most=1, resumable=True,
        ),
    ] = None  # fmt: skip
    seed: Annotated[int, Setting("Seed of the noise; one noise per image and view.")] = 0
    text: Annotated[TextCondition, Setting("Condition on captions, or on an empty prompt.")] = "caption"
    batch: Annotated[
        int | Literal["auto"],
        Setting(
            "Images per forward pass, each at all timesteps; auto: 32, halved when memory runs out.",
            least=1, resumable=True, reads=read_batch, metavar="N|auto",
        ),
    ] = 8  # fmt: skip
    image_size: Annotated[
        int, Setting("Side of the student's images; of those that keep their aspect the shorter.", least=1)
    ] = 224
    image_shape: Annotated[
        ImageShape,
        Setting("Student's images squashed to a square, or with their aspect, for a trainer that crops them."),
    ] = "square"
    image_format: Annotated[Literal["jpeg", "png"], Setting("File format of the student's images.")] = "jpeg"
    image_quality: Annotated[int, Setting("JPEG quality of the student's images.", least=1, most=100)] = 95
    with_images: Annotated[bool, Setting("Store the student's images.", option="--images")] = True
    batch_timeout: Annotated[
        float | None,
        Setting(
            "Leave out a batch, or an image, that hangs for so many seconds; ten times as many for the first batch.",
            above=0, resumable=True, metavar="SECONDS",
        ),
    ] = None  # fmt: skip
    samples_per_shard: Annotated[
        int | None, Setting("Samples in a file of features; default: about 64 MB, at most 512 samples.", least=1)
    ] = None

    def __post_init__(self) -> None:
        check_timesteps(list(self.timesteps), self.num_steps)
        # Every reader of a configuration finds the views by the names that they have in the cache.
        object.__setattr__(self, "views", expand_views(self.views))
        splits = self.feature_splits
        if not splits or not set(SPLITS).issuperset(splits) or len(set(splits)) != len(splits):
            raise DitDistillError(f"--features {','.join(splits)}: name one or more of {', '.join(SPLITS)}, each once")
        if not 0 < self.crops_scale[0] <= self.crops_scale[1] <= 1:
            raise DitDistillError("--crops-scale must be two shares of the area, the smaller one first, such as 0.2,1")
        if not 0 < self.crops_ratio[0] <= self.crops_ratio[1] < math.inf:
            raise DitDistillError("--crops-ratio must be two ratios, the smaller one first, such as 0.75,1.33")
        if len(set(self.taps)) != len(self.taps) or not self.taps:
            raise DitDistillError(f"--taps {','.join(self.taps)}: name at least one tap, each once")
        check_limits(self)
        self._refuse_what_would_do_nothing()
        if self.store == "webdataset" and self.compression != "none":
            raise DitDistillError(
                f"--store webdataset is not compressed; leave out --compression {self.compression}, or use --store zarr"
            )

    def _refuse_what_would_do_nothing(self) -> None:
        if self.massive_channels == "keep" and self.massive_factor != DEFAULT_MASSIVE_FACTOR:
            raise DitDistillError(
                f"--massive-factor {self.massive_factor:g}: massive channels are kept; add --massive-channels remove "
                "or standardize"
            )
        if any(map(is_crop, self.views)):
            return
        for option, given, usual in (
            ("--crops-scale", self.crops_scale, DEFAULT_SCALE),
            ("--crops-ratio", self.crops_ratio, DEFAULT_RATIO),
        ):
            if tuple(given) != usual:
                raise DitDistillError(f"{option}: none of the views is a random crop; add crops:K to --views")

    @property
    def batch_images(self) -> int:
        """How many images are read and computed together."""
        return AUTO_BATCH if self.batch == "auto" else self.batch

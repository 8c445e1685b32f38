"""What a cache build computes and stores, as one typed value."""

from dataclasses import dataclass
from typing import Literal

from cache_schema.errors import DitDistillError
from cache_schema.format.manifest import Compression, EncodingKind, StoreKind
from pipeline.curriculum import DEFAULT_STEPS, DEFAULT_TIMESTEPS, check_timesteps
from pipeline.datasets.base import SPLITS
from pipeline.inputs.views import VIEWS

AUTO_BATCH = 32


@dataclass(frozen=True)
class BuildConfig:
    """What to cache and how. taps, timesteps, views and splits as in the manifest.

    batch: images per forward pass, each at all timesteps; "auto" begins with AUTO_BATCH and halves the pass on
    out-of-memory, down to one image at one timestep.
    min_cosine: the least mean cosine, per tap and timestep, between stored and computed tokens; None accepts any.
    """

    taps: tuple[str, ...] = ("hidden",)
    timesteps: tuple[int, ...] = DEFAULT_TIMESTEPS
    num_steps: int = DEFAULT_STEPS
    views: tuple[str, ...] = ("canonical",)
    feature_splits: tuple[str, ...] = ("train", "unlabeled")
    store: StoreKind = "zarr"
    encoding: EncodingKind = "int8"
    pool: int = 1
    pca: int | None = None
    compression: Compression = "none"
    min_cosine: float | None = None
    seed: int = 0
    text: Literal["caption", "none"] = "caption"
    batch: int | Literal["auto"] = 8
    image_size: int = 224
    image_format: Literal["jpeg", "png"] = "jpeg"
    image_quality: int = 95
    with_images: bool = True
    samples_per_shard: int | None = None

    def __post_init__(self) -> None:
        check_timesteps(list(self.timesteps), self.num_steps)
        for value, known, option in (
            (self.views, VIEWS, "--views"),
            (self.feature_splits, SPLITS, "--features"),
        ):
            unknown = [v for v in value if v not in known]
            if unknown or not value or len(set(value)) != len(value):
                raise DitDistillError(f"{option} {','.join(value)}: name one or more of {', '.join(known)}, each once")
        if len(set(self.taps)) != len(self.taps) or not self.taps:
            raise DitDistillError(f"--taps {','.join(self.taps)}: name at least one tap, each once")
        for name in ("batch", "image_size", "pool", "pca"):
            value = getattr(self, name)
            if value not in (None, "auto") and value < 1:
                raise DitDistillError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            raise DitDistillError(f"--min-cosine must be between -1 and 1, not {self.min_cosine}")
        if self.store == "webdataset" and self.compression != "none":
            raise DitDistillError(
                f"--store webdataset is not compressed; leave out --compression {self.compression}, or use --store zarr"
            )

    @property
    def batch_images(self) -> int:
        """How many images are read and computed together."""
        return AUTO_BATCH if self.batch == "auto" else self.batch

"""The manifest: what a cache holds and what made it, as frozen values that round-trip through JSON.

How a manifest is read from and written to disk is `cache_schema.format.manifest_file`.
"""

import itertools
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from cache_schema.format.identity import compute_cache_id
from cache_schema.format.vocabulary import (
    CROP_VIEW,
    Compression,
    ContextMode,
    EncoderInput,
    EncodingKind,
    ImageShape,
    MassiveChannels,
    ObjectCrop,
    Quantization,
    StoreKind,
    TextCondition,
)

SCHEMA_VERSION: Literal[2] = 2

# Sizes no honest cache comes near. They keep a hostile manifest from promising shapes that cannot be allocated.
MAX_TOKENS = 1 << 20
MAX_CHANNELS = 1 << 20
MAX_CHUNK_VALUES = 1 << 28
MAX_ROWS = 1 << 34
MAX_SHARD_CHUNKS = 1 << 24

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=MAX_ROWS)]
Positive = Annotated[int, Field(ge=1, le=MAX_ROWS)]


def _distinct(values: list) -> list:
    if len(set(values)) != len(values):
        raise ValueError("values must be distinct")
    return values


def _ascending(values: list[int]) -> list[int]:
    if any(b <= a for a, b in itertools.pairwise(values)):
        raise ValueError("values must be ascending")
    return values


class FrozenModel(BaseModel):
    """A part of a manifest or of a journal record: immutable, and refusing fields it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetInfo(FrozenModel):
    """The data set a cache was made from; `fingerprint` digests its samples and its split.

    `quarantined` counts the images that were set aside before the build, which have a row but neither features nor a
    student image. Those that the teacher itself failed on are `Manifest.failed_rows`.
    """

    name: str
    protocol: str
    fingerprint: str
    superclass: str
    counts: dict[str, Count]
    feature_splits: list[str]
    feature_rows: Count
    quarantined: Count = 0


class TeacherInfo(FrozenModel):
    """The teacher; `digests` maps each component (transformer, vae, ...) to the SHA-256 of its weights.

    quantization: number format of the transformer's weights in memory, None as they were saved. context: whether the
    context tokens see the noisy tokens (joint), or not, so that they are computed once for all timesteps (reused).
    input: what the features are of: the object's crop, or the whole image (image encoders alone). crop: what that crop
    is: the box, squashed, or the square around it (`cache_schema.format.square`).
    """

    family: str
    source: str
    revision: str | None = None
    pipeline_class: str
    digests: dict[str, Sha256]
    lora_digest: Sha256 | None = None
    dtype: str
    resolution: Positive
    text: TextCondition
    guidance: FiniteFloat | None = None
    quantization: Quantization | None = None
    context: ContextMode = "joint"
    input: EncoderInput = "object"
    crop: ObjectCrop = "box"


class Curriculum(FrozenModel):
    """Which scheduler steps are cached: step p of `num_steps` (1 the noisiest) at noise level `sigmas[i]`."""

    num_steps: Positive
    timesteps: Annotated[list[Positive], Field(min_length=1), AfterValidator(_distinct)]
    sigmas: list[FiniteFloat]
    seed: int

    @model_validator(mode="after")
    def _one_sigma_per_timestep(self) -> Self:
        if len(self.sigmas) != len(self.timesteps):
            raise ValueError(f"{len(self.timesteps)} timesteps but {len(self.sigmas)} sigmas")
        if max(self.timesteps) > self.num_steps:
            raise ValueError(f"timestep {max(self.timesteps)} is beyond num_steps {self.num_steps}")
        return self


class TapInfo(FrozenModel):
    """Where in the teacher features are read, and the shape in which they are stored.

    `tokens` (grid height x width) of `channels` values, after pooling and PCA; `teacher_channels` is the number before
    PCA, where it differs.
    """

    # A tap names a folder, so it may not look like a path, nor like the `.scale` and `.channel` folders beside it.
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}(\.[0-9]{1,6}(\.modulated)?)?$")]
    tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
    grid: tuple[Positive, Positive]
    teacher_channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] | None = None

    @model_validator(mode="after")
    def _sane_shape(self) -> Self:
        if self.grid[0] * self.grid[1] != self.tokens:
            raise ValueError(f"grid {self.grid[0]}x{self.grid[1]} does not have {self.tokens} tokens")
        if self.tokens * self.channels > MAX_CHUNK_VALUES:
            raise ValueError(f"{self.tokens} tokens x {self.channels} channels is more than this format allows")
        if self.channels * (self.teacher_channels or 1) > MAX_CHUNK_VALUES:
            raise ValueError(f"{self.channels} components of {self.teacher_channels} are more than this format allows")
        return self


class Encoding(FrozenModel):
    """How features become bytes.

    First the mean over `pool` x `pool` tokens, then the `pca` strongest principal components of the channels (None
    keeps the channels), then `kind`, a number format, then `compression`, which loses nothing. Before the components
    massive channels are treated: those whose root mean square is at least `massive_factor` times the median of the
    channels (`cache_schema.encoding.massive`).
    """

    kind: EncodingKind
    pool: Annotated[int, Field(ge=1, le=64)] = 1
    pca: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] | None = None
    compression: Compression = "none"
    massive: MassiveChannels = "keep"
    massive_factor: Annotated[FiniteFloat, Field(gt=1)] | None = None

    @model_validator(mode="after")
    def _rule_where_it_is_used(self) -> Self:
        if (self.massive == "keep") != (self.massive_factor is None):
            raise ValueError(f"massive channels: {self.massive} with a factor of {self.massive_factor}")
        return self

    @property
    def scaled(self) -> bool:
        """Whether values are stored relative to a calibrated amplitude per channel and a scale per token."""
        return self.kind in ("int8", "float8_e4m3")

    @property
    def calibrated(self) -> bool:
        """Whether statistics of the features are needed before the first of them can be stored."""
        return self.scaled or self.pca is not None or self.massive != "keep"


class ImagesInfo(FrozenModel):
    """The student images: side in pixels, file format, quality where the format has one, and shape.

    square: the whole image, squashed to `size` by `size`. aspect: as it was taken, its shorter side `size` long, so
    that a trainer can crop it; never enlarged, and the longer side at most `LONGEST` times `size`.
    """

    LONGEST: ClassVar[int] = 4

    size: Positive
    format: Literal["jpeg", "png", "webp"]
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    shape: ImageShape = "square"

    def stored_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in which an image of `width` by `height` pixels is stored."""
        if self.shape == "square":
            return self.size, self.size
        shorter, longer = max(1, min(width, height)), max(1, width, height)
        scale = min(1.0, self.size / shorter, self.LONGEST * self.size / longer)
        return max(1, round(width * scale)), max(1, round(height * scale))

    @property
    def longest_side(self) -> int:
        """The most pixels that a side of a stored image may have."""
        return self.size * (1 if self.shape == "square" else self.LONGEST)


class CropsInfo(FrozenModel):
    """How the random crops of the views `crop.0`, `crop.1`, … were drawn; their boxes are in the samples table.

    `scale` is the share of the area that the teacher sees of an image otherwise, `ratio` that of width to height, each
    from least to most.
    """

    scale: tuple[FiniteFloat, FiniteFloat]
    ratio: tuple[FiniteFloat, FiniteFloat]

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crops of {self.scale} of the area, {self.ratio} as wide as high")
        return self


class StoreInfo(FrozenModel):
    """How rows are grouped into files. Never part of the cache id."""

    kind: StoreKind = "zarr"
    samples_per_shard: Positive
    feature_shards: Count
    images_per_shard: Positive
    image_shards: Count


class Fidelity(FrozenModel):
    """How close stored features of one tap and timestep are to what the teacher computed, after pooling.

    Compared are teacher features, pooled where the encoding pools, with decoded ones, returned to the teacher's
    channels where the encoding has PCA: what principal components and number formats lose counts, what pooling does
    not.
    `cosine_mean` and `cosine_min` are over tokens; `relative_error` is |decoded - original| / |original| over all
    values, `channel_error` the same per channel, root-mean-squared over channels, so that a few huge channels cannot
    hide what happened to the others.
    """

    tap: str
    timestep: Positive
    cosine_mean: FiniteFloat
    cosine_min: FiniteFloat
    relative_error: FiniteFloat
    channel_error: FiniteFloat


class Provenance(FrozenModel):
    """Everything about one build that another build of the same cache would not repeat.

    `converted` says of a copy in another store what it was copied from, `pulled` of a part of a cache what of it there
    is, `owner` whom who pushed it wants to be asked about it; the rest is that of the original build.
    """

    created: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    device: str | None = None
    seconds: FiniteFloat | None = None
    command: str | None = None
    converted: str | None = None
    pulled: str | None = None
    owner: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    # Covers the whole manifest, this part included; it is here because it changes whenever this part does.
    checksum: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")] | None = None


class Manifest(FrozenModel):
    """What a cache holds and what made it. See the parts for their fields; all sizes are bytes.

    `failed_rows` are those of the rows meant to have features on which the teacher failed (NaN or infinite values);
    `massive_channels` of a tap those of its channels, as the teacher numbers them, that were not kept as they are.
    Known, like everything from `fidelity` on, once the cache is sealed.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    cache_id: str = ""
    dataset: DatasetInfo
    teacher: TeacherInfo
    curriculum: Curriculum
    taps: Annotated[list[TapInfo], Field(min_length=1)]
    encoding: Encoding
    views: Annotated[list[str], Field(min_length=1), AfterValidator(_distinct)]
    crops: CropsInfo | None = None
    images: ImagesInfo | None = None
    store: StoreInfo
    fidelity: list[Fidelity] = Field(default_factory=list)
    failed_rows: Annotated[list[Count], AfterValidator(_ascending)] = Field(default_factory=list)
    massive_channels: dict[str, Annotated[list[Count], AfterValidator(_ascending)]] = Field(default_factory=dict)
    provenance: Provenance = Field(default_factory=Provenance)
    sealed: bool = False
    bytes_features: Count | None = None
    bytes_images: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _distinct([tap.name for tap in self.taps])
        crops = [view for view in self.views if view.startswith(CROP_VIEW)]
        if crops != [f"{CROP_VIEW}{k}" for k in range(len(crops))] or bool(crops) != (self.crops is not None):
            raise ValueError(f"views {', '.join(self.views)} with crops {self.crops}")
        rows, per_shard = self.dataset.feature_rows, self.store.samples_per_shard
        if self.store.feature_shards != -(-rows // per_shard):
            raise ValueError(f"{rows} rows by {per_shard} are not {self.store.feature_shards} shards")
        if per_shard * len(self.views) * len(self.curriculum.timesteps) > MAX_SHARD_CHUNKS:
            raise ValueError("a shard would hold more chunks than this format allows")
        if self.store.kind == "webdataset" and self.encoding.compression != "none":
            raise ValueError("a webdataset store is not compressed; choose compression none, or the zarr store")
        for tap in self.taps:
            expected_channels = tap.channels if self.encoding.pca is None else self.encoding.pca
            if tap.channels != expected_channels or (tap.teacher_channels is None) != (self.encoding.pca is None):
                raise ValueError(f"tap {tap.name} does not have the channels that pca {self.encoding.pca} leaves")
            if tap.channels * len(self.curriculum.timesteps) > MAX_CHUNK_VALUES:
                raise ValueError(f"tap {tap.name} has more channels and timesteps than this format allows")
        for name, channels in self.massive_channels.items():
            treated = self.tap(name)
            if treated is None or (channels and channels[-1] >= (treated.teacher_channels or treated.channels)):
                raise ValueError(f"massive channels of {name}, which has none of that number")
        if self.failed_rows and self.failed_rows[-1] >= rows:
            raise ValueError(f"failed row {self.failed_rows[-1]} is not one of the {rows} rows with features")
        if self.images is None and self.store.image_shards:
            raise ValueError("image shards without image settings")
        expected = compute_cache_id(self.document())
        if not self.cache_id:
            # Computed here rather than asked for, so that no manifest can carry another's name.
            object.__setattr__(self, "cache_id", expected)
        elif self.cache_id != expected:
            raise ValueError(f"cache_id {self.cache_id[:12]} is not that of its contents ({expected[:12]})")
        return self

    @property
    def label(self) -> str:
        """A short name for messages: the data set and the first digits of the cache id."""
        return f"{self.dataset.name}-{self.cache_id[:8]}"

    def document(self) -> dict[str, Any]:
        """The manifest as plain JSON values, without what says that a cache is as caches were before it was there."""
        document = self.model_dump(mode="json")
        if self.crops is None:
            del document["crops"]
        if self.teacher.crop == "box":
            del document["teacher"]["crop"]
        return document

    @property
    def crop_count(self) -> int:
        """How many of the views are random crops."""
        return sum(view.startswith(CROP_VIEW) for view in self.views)

    @property
    def default_tap(self) -> str:
        """The tap that is read unless another is asked for: hidden where there is one, otherwise the first."""
        return "hidden" if self.tap("hidden") else self.taps[0].name

    def tap(self, name: str) -> TapInfo | None:
        """Return the tap called `name`, or None."""
        return next((tap for tap in self.taps if tap.name == name), None)

"""What a training run is made of, whatever its method: typed, frozen, validated once, saved with the run.

A method's own config is a subclass of `TrainConfig` beside the method; `trainer.methods.settings` finds it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cache_schema.fields import Setting
from cache_schema.storage.files import write_file


def read_workers(text: str) -> int | Literal["auto"]:
    """A number of processes or auto. Raises ValueError."""
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise ValueError(f"{text!r} is neither a number of processes nor auto")
    return int(text)


# Where rows without a label are from: the split, the training images (again, in another view), or both.
UnlabelledFrom = Literal["unlabeled", "train", "both"]

ALONE = "baseline"  # the method that reads no teacher's features


class Frozen(BaseModel):
    """Values that were checked once: unknown names are refused, and nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StudentConfig(Frozen):
    """The network to train: a timm name, with timm's own values wherever a field is None."""

    name: str = "vit_base_patch16_224.augreg_in21k"
    pretrained: bool = False
    weights: str | None = None  # a safetensors file with timm's parameter names
    img_size: Annotated[
        int | None, Setting("Side of the square images it sees, pixels; the network's own by default.")
    ] = Field(default=None, ge=8)
    patch_size: int | None = Field(default=None, ge=1)
    depth: int | None = Field(default=None, ge=1)
    embed_dim: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)
    drop_path_rate: float | None = Field(default=None, ge=0, lt=1)
    batch_norm: Annotated[
        Literal["train", "freeze_statistics", "freeze"],
        Setting(
            "Batch norms of a pretrained network: trained, with the statistics they came with, or left alone; small "
            "batches have poor statistics of their own."
        ),
    ] = "train"
    batch_norm_momentum: Annotated[float | None, Setting("Of the statistics of batch norms; timm's by default.")] = (
        Field(default=None, gt=0, le=1)
    )
    extra: dict[str, bool | int | float | str] = Field(default_factory=dict)  # any other timm argument

    def timm_kwargs(self) -> dict[str, Any]:
        """Only the arguments that were given: a convolutional net does not know `patch_size`."""
        ours = {"name", "pretrained", "weights", "batch_norm", "batch_norm_momentum", "extra"}
        return {**self.model_dump(exclude=ours, exclude_none=True), **self.extra}

    @property
    def starts_trained(self) -> bool:
        """Whether the network has weights to start from, rather than random ones."""
        return self.pretrained or self.weights is not None


class OptimConfig(Frozen):
    """Adam with cosine annealing; a method adds the multiples of the learning rate that its own parts have."""

    name: Annotated[Literal["adam", "adamw"], Setting("adamw decays weights apart from the gradient.")] = "adam"
    lr: Annotated[float, Setting("Peak learning rate of the student.")] = Field(default=1e-3, gt=0)
    weight_decay: Annotated[
        float, Setting("Of matrices; norms, biases, position embeddings, tokens and proxies have none.")
    ] = Field(default=0.0, ge=0)
    layer_decay: Annotated[
        float | None, Setting("Learning rate of each layer of the student, as a multiple of the next one's, e.g. 0.75.")
    ] = Field(default=None, gt=0, le=1)
    warmup: Annotated[float, Setting("Share of all updates over which the learning rate grows from 0.")] = Field(
        default=0.0, ge=0, lt=1
    )
    final_lr_ratio: Annotated[float, Setting("Learning rate at the end, as a share of the peak.")] = Field(
        default=0.0, ge=0, le=1
    )
    grad_clip: Annotated[float | None, Setting("Largest norm of the gradient of all parameters.")] = Field(
        default=None, gt=0
    )
    accumulate: Annotated[
        int, Setting("Parts that a batch is cut into, one after the other, where memory is short.")
    ] = Field(default=1, ge=1)
    ema: Annotated[
        float | None, Setting("Keep and evaluate a moving average of all weights with this decay, e.g. 0.999.")
    ] = Field(default=None, gt=0, lt=1)


class RegressionConfig(Frozen):
    """What of the teacher's features the student regresses, by heads that are thrown away after training."""

    weight: float = Field(default=0.0, ge=0)  # of the whole term; 0: none
    tokens: float = Field(default=1.0, ge=0)  # the part of each place of the image
    pooled: float = Field(default=1.0, ge=0)  # the part of their mean, by E_R
    components: int = Field(default=256, ge=1)  # principal components of the features, per timestep
    power: float = Field(default=0.5, ge=0, le=1)  # 0: as they vary, 1: whitened

    @property
    def wanted(self) -> bool:
        return self.weight > 0 and self.tokens + self.pooled > 0


class AugmentConfig(Frozen):
    """Random changes to the student's images; the teacher's features are those of the view that is changed."""

    crop_scale: Annotated[
        tuple[float, float] | None,
        Setting("Share of the image's area that a random crop has, from least to most, e.g. 0.2,1."),
    ] = None
    flip: Annotated[
        bool,
        Setting(
            "Train on mirrored images as on one more view; where a cache holds the view hflip, with the features of it."
        ),
    ] = False
    color: Annotated[float, Setting("Brightness, contrast and saturation times 1 ± this.")] = Field(
        default=0.0, ge=0, le=1
    )
    hue: Annotated[float, Setting("Turn hues by up to ± this share of the circle; slow.")] = Field(
        default=0.0, ge=0, le=0.5
    )
    erase: Annotated[float, Setting("Chance that a random patch is covered.")] = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _a_range(self) -> AugmentConfig:
        if self.crop_scale is not None and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must be two shares of the area, the smaller one first, such as 0.2,1")
        return self

    @property
    def changes_pixels(self) -> bool:
        """Whether anything is done to an image after its crop."""
        return bool(self.color or self.hue or self.erase)


class TrainConfig(Frozen):
    """One run. The same config, cache and kind of machine give the same student."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # what a method adds to the presets below

    cache: Annotated[str, Setting("Teacher cache to train from: a folder or a URL.", resumable=True)] = ""
    local_cache: Annotated[
        str, Setting("Disk that may hold what was fetched of a cache at a URL, e.g. 50GB.", resumable=True)
    ] = "10GB"
    method: str
    seed: Annotated[int, Setting("The one seed of the run.")] = Field(default=0, ge=0, lt=1 << 32)
    epochs: Annotated[int, Setting("Passes over the labelled images.")] = Field(default=30, ge=1)
    updates: Annotated[int | None, Setting("Student updates, instead of epochs.")] = Field(default=None, ge=1)
    batch_size: Annotated[int, Setting("Labelled images per update.")] = Field(default=32, ge=1)
    sampler: Annotated[
        Literal["shuffled", "balanced"],
        Setting("balanced: each batch has images-per-class images of classes-per-batch classes."),
    ] = "shuffled"
    classes_per_batch: Annotated[
        int | None, Setting("Of sampler balanced, instead of batch-size; by default batch-size / images-per-class.")
    ] = Field(default=None, ge=1)
    images_per_class: Annotated[int | None, Setting("Of sampler balanced; 4 by default.")] = Field(default=None, ge=1)
    validation_classes: Annotated[
        float, Setting("Share of the training classes held out to follow recall on; never test classes, e.g. 0.2.")
    ] = Field(default=0.0, ge=0, lt=1)
    views: Annotated[
        tuple[str, ...] | None, Setting("Views to train on; all that the caches have and the trainer can pair.")
    ] = None
    augment: AugmentConfig = AugmentConfig()
    fit: Annotated[
        Literal["auto", "squash", "crop"],
        Setting(
            "Images at test, and in training without crops: squashed to a square, or the centre of them; auto: the "
            "centre where the cache keeps their aspect."
        ),
    ] = "auto"
    device: Annotated[str, Setting("auto, cpu, cuda, cuda:1, …", resumable=True)] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Setting("Of the forward pass; weights are always float32. auto: bfloat16 where it is surely not slower."),
    ] = "auto"
    compile: Annotated[bool, Setting("Compile the student's network: a minute at the start, faster afterwards.")] = (
        False
    )
    deterministic: Annotated[
        bool, Setting("Only algorithms that give the same bits each time, so that a run on a GPU can be repeated.")
    ] = False
    workers: Annotated[
        Annotated[int, Field(ge=0)] | Literal["auto"],
        Setting(
            "Loader processes; 0: one thread; auto: several where a GPU waits for batches, else none.",
            resumable=True,
            reads=read_workers,
            metavar="N|auto",
        ),
    ] = "auto"
    threads: Annotated[int | None, Setting("Of torch; its own choice by default.", resumable=True)] = Field(
        default=None, ge=1
    )
    image_memory_gb: Annotated[
        float | None,
        Setting("Decoded images stay in memory up to this; by default a quarter of what is free.", resumable=True),
    ] = Field(default=None, ge=0)
    verify_reads: Annotated[
        bool, Setting("Hold what is read from the cache against its checksums.", resumable=True)
    ] = True
    log_every: Annotated[int, Setting("Updates between records of the log.", resumable=True)] = Field(default=10, ge=1)
    track: Annotated[
        tuple[Literal["wandb", "mlflow"], ...],
        Setting("Also log to wandb or mlflow, installed and set up as usual.", resumable=True),
    ] = ()
    eval_every: Annotated[
        int, Setting("Epochs between measurements of recall on validation classes; 0: only at the end.", resumable=True)
    ] = Field(default=0, ge=0)
    against: Annotated[
        str | None,
        Setting(
            "A run, the baseline say, whose recall on validation classes is held beside this one's at the same update.",
            resumable=True,
        ),
    ] = None
    checkpoint_every: Annotated[
        int, Setting("Epochs between checkpoints; 0: only when interrupted.", resumable=True)
    ] = Field(default=1, ge=0)
    keep_checkpoints: Annotated[
        int, Setting("How many checkpoints of an unfinished run stay, the newest ones.", resumable=True)
    ] = Field(default=2, ge=1)
    student: StudentConfig = StudentConfig()
    optim: OptimConfig = OptimConfig()

    @model_validator(mode="after")
    def _one_sampler(self) -> TrainConfig:
        if self.sampler == "shuffled" and (self.classes_per_batch or self.images_per_class):
            raise ValueError("classes_per_batch and images_per_class are of sampler balanced: add --sampler balanced")
        each = self.balanced[1]
        if self.sampler == "balanced" and self.classes_per_batch is None and self.batch_size % each:
            raise ValueError(
                f"sampler balanced: batch_size {self.batch_size} is no multiple of {each} images per class; "
                "change one, or set --classes-per-batch"
            )
        return self

    @property
    def followed(self) -> frozenset[str]:
        """Fields that may change at a resume in other runs, and that this one's training goes by."""
        return frozenset()

    @property
    def at_once(self) -> int:
        """Labelled images that a loss sees together: a batch, or the part of it that `optim.accumulate` cuts."""
        classes, each = self.balanced
        batch = classes * each if self.sampler == "balanced" else self.batch_size
        return batch // self.optim.accumulate

    @property
    def balanced(self) -> tuple[int, int]:
        """Classes in a batch and images of each, of sampler balanced."""
        each = self.images_per_class or 4
        return self.classes_per_batch or self.batch_size // each, each


# Small enough for two CPU cores. The choices here and in the methods were made by measurement: see
# benchmarks/README.md.
_SMALL: dict[str, Any] = {
    "student": {
        "name": "vit_tiny_patch16_224",
        "img_size": 96,
        "patch_size": 16,
        "depth": 6,
        "embed_dim": 192,
        "num_heads": 3,
    },
    "optim": {"lr": 5e-4, "warmup": 0.1},
}

# A pretrained network at its own size, as metric learning trains one. The published settings it was held against:
# Hyp-ViT (Ermolov et al., CVPR 2022): AdamW, 3e-5 (DINO 1e-5), decay 0.01, clipping at 3, batch 900, random resized
# crop and flip. HIER (Kim et al., CVPR 2023): AdamW, 5e-6 to 1e-5, decay 0.01 (SOP 1e-4), clipping at 1, batch 90, a
# warm-up of one epoch in 50, 100 times the rate for what starts at random. OML repeats the images and AdamW 1e-5, 0.01
# of Hyp-ViT.
_RECOMMENDED: dict[str, Any] = {
    "batch_size": 64,
    "augment": {"crop_scale": [0.2, 1.0], "flip": True, "color": 0.25},
    "student": {"pretrained": True},
    "optim": {"name": "adamw", "lr": 3e-5, "weight_decay": 0.01, "warmup": 0.05, "grad_clip": 1.0},
}

# What of `recommended` is otherwise for other students, by measurement on held-out classes: see "Real photographs" in
# benchmarks/README.md. At a pretrained transformer's rates a convolutional network with batch norms is undertrained
# (R@1 after 4 epochs: 42.8 at 1e-4, 68.3 at 1e-3), and so is whatever starts at random.
RECOMMENDED_FOR: dict[str, dict[str, Any]] = {
    "convolutional": {
        "student": {"batch_norm_momentum": 0.02},
        "optim": {
            "lr": 2e-3, "weight_decay": 0.05, "warmup": 0.1,
            "gim_lr_scale": 1.0, "proxy_lr_scale": 5.0, "head_lr_scale": 0.5,
        },
    },
    "untrained": {
        "optim": {
            "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1,
            "gim_lr_scale": 1.0, "proxy_lr_scale": 10.0, "head_lr_scale": 0.5,
        },
        "regression": {"weight": 4.0},
    },
}  # fmt: skip

# recommended: a pretrained student on real photographs. paper: the setting as published, with pretrained weights as
# there. small: a small student on any cache, from scratch. demo: small, on the demo's data set.
PRESETS: dict[str, dict[str, Any]] = {
    "recommended": _RECOMMENDED,
    "paper": {},
    "small": _SMALL,
    "demo": {**_SMALL, "epochs": 15},
}
# What is to be known of a preset wherever it is named.
PRESET_REMARKS = {"paper": "as published, untuned; pretrained weights needed"}


def name_preset(preset: str) -> str:
    """A preset's name, with the remark on it where there is one."""
    remark = PRESET_REMARKS.get(preset)
    return preset if remark is None else f"{preset} ({remark})"


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the config as indented JSON."""
    write_file(path, (config.model_dump_json(indent=2) + "\n").encode())

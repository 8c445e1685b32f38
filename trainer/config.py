"""What a training run is made of, whatever its method: typed, frozen, validated once, saved with the run.

A method's own config is a subclass of `TrainConfig` beside the method; `trainer.methods.settings` finds it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from cache_schema.fields import Setting
from cache_schema.storage.files import write_file


class Frozen(BaseModel):
    """Values that were checked once: unknown names are refused, and nothing changes afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StudentConfig(Frozen):
    """The network to train: a timm name, with timm's own values wherever a field is None."""

    name: str = "vit_base_patch16_224.augreg_in21k"
    pretrained: bool = False
    weights: str | None = None  # a safetensors file with timm's parameter names
    img_size: int | None = Field(default=None, ge=8)
    patch_size: int | None = Field(default=None, ge=1)
    depth: int | None = Field(default=None, ge=1)
    embed_dim: int | None = Field(default=None, ge=1)
    num_heads: int | None = Field(default=None, ge=1)
    drop_path_rate: float | None = Field(default=None, ge=0, lt=1)
    extra: dict[str, bool | int | float | str] = Field(default_factory=dict)  # any other timm argument

    def timm_kwargs(self) -> dict[str, Any]:
        """Only the arguments that were given: a convolutional net does not know `patch_size`."""
        named = self.model_dump(exclude={"name", "pretrained", "weights", "extra"}, exclude_none=True)
        return {**named, **self.extra}


class OptimConfig(Frozen):
    """Adam with cosine annealing; a method adds the multiples of the learning rate that its own parts have."""

    name: Literal["adam", "adamw"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.0, ge=0, lt=1)  # fraction of all updates
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    grad_clip: float | None = Field(default=None, gt=0)  # largest gradient norm


class TrainConfig(Frozen):
    """One run. The same config, cache and kind of machine give the same student."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # what a method adds to the presets below

    cache: Annotated[str, Setting("Teacher cache to train from.", resumable=True)] = ""
    method: str
    seed: Annotated[int, Setting("The one seed of the run.")] = Field(default=0, ge=0)
    epochs: Annotated[int, Setting("Passes over the labelled images.")] = Field(default=30, ge=1)
    updates: Annotated[int | None, Setting("Student updates, instead of epochs.")] = Field(default=None, ge=1)
    batch_size: Annotated[int, Setting("Labelled images per update.")] = Field(default=32, ge=1)
    validation_classes: Annotated[
        float, Setting("Share of the training classes held out to follow recall on; never test classes, e.g. 0.2.")
    ] = Field(default=0.0, ge=0, lt=1)
    views: Annotated[
        tuple[str, ...] | None, Setting("Views to train on; all that the caches have and the trainer can pair.")
    ] = None
    augment: Literal["none", "color"] = "none"
    device: Annotated[str, Setting("auto, cpu, cuda, cuda:1, …", resumable=True)] = "auto"
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"], Setting("Of the forward pass; weights are always float32.")
    ] = "auto"
    workers: Annotated[int, Setting("Loader processes; 0: one thread.", resumable=True)] = Field(default=0, ge=0)
    threads: Annotated[int | None, Setting("Of torch; its own choice by default.", resumable=True)] = Field(
        default=None, ge=1
    )
    image_memory_gb: Annotated[float, Setting("Decoded images stay in memory up to this.", resumable=True)] = Field(
        default=1.0, ge=0
    )
    verify_reads: Annotated[
        bool, Setting("Hold what is read from the cache against its checksums.", resumable=True)
    ] = True
    log_every: Annotated[int, Setting("Updates between records of the log.", resumable=True)] = Field(default=10, ge=1)
    eval_every: Annotated[
        int, Setting("Epochs between measurements of recall on validation classes; 0: only at the end.", resumable=True)
    ] = Field(default=0, ge=0)
    checkpoint_every: Annotated[
        int, Setting("Epochs between checkpoints; 0: only when interrupted.", resumable=True)
    ] = Field(default=1, ge=0)
    student: StudentConfig = StudentConfig()
    optim: OptimConfig = OptimConfig()


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

# paper: the full setting. small: a small student on any cache, from scratch. demo: small, on the demo's data set.
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "small": _SMALL, "demo": _SMALL}


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the config as indented JSON."""
    write_file(path, (config.model_dump_json(indent=2) + "\n").encode())

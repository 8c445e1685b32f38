"""What a training run is made of, whatever its method: typed, frozen, validated once, saved with the run.

A method's own config is a subclass of `TrainConfig` beside the method; `trainer.methods.settings` finds it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from cache_schema.storage.files import write_file


def _split_commas(value: Any) -> Any:
    """Let `10,16` and `canonical,hflip` stand for lists, so that every field can be set from a shell."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) else value


Timesteps = Annotated[tuple[int, ...], BeforeValidator(_split_commas)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]


# A field with this changes neither the numbers nor their order.
FREE_ON_RESUME: dict[str, Any] = {"free_on_resume": True}


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

    cache: str = Field(default="", json_schema_extra=FREE_ON_RESUME)
    method: str
    seed: int = Field(default=0, ge=0)
    epochs: int = Field(default=30, ge=1)
    updates: int | None = Field(default=None, ge=1)  # when given, ends the run instead of `epochs`
    batch_size: int = Field(default=32, ge=1)
    # share of the training classes that is held out: recall is followed on these, never on test classes
    validation_classes: float = Field(default=0.0, ge=0, lt=1)
    views: Names | None = None  # None: all that the caches have and the trainer can pair
    augment: Literal["none", "color"] = "none"
    device: str = Field(default="auto", json_schema_extra=FREE_ON_RESUME)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the forward pass; weights are always float32
    # 0: one prefetch thread
    workers: int = Field(default=0, ge=0, json_schema_extra=FREE_ON_RESUME)
    # None: torch's own choice
    threads: int | None = Field(default=None, ge=1, json_schema_extra=FREE_ON_RESUME)
    # decoded images stay in memory up to this
    image_memory_gb: float = Field(default=1.0, ge=0, json_schema_extra=FREE_ON_RESUME)
    # hold what is read from the cache against its checksums
    verify_reads: bool = Field(default=True, json_schema_extra=FREE_ON_RESUME)
    log_every: int = Field(default=10, ge=1, json_schema_extra=FREE_ON_RESUME)  # updates
    # epochs between measurements of recall on the validation classes; 0: only at the end
    eval_every: int = Field(default=0, ge=0, json_schema_extra=FREE_ON_RESUME)
    # epochs; 0: only when interrupted
    checkpoint_every: int = Field(default=1, ge=0, json_schema_extra=FREE_ON_RESUME)
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


def free_on_resume(config: type[BaseModel]) -> set[str]:
    """Names of the fields that change neither the numbers nor their order: a run may be resumed with others."""
    return {name for name, field in config.model_fields.items() if field.json_schema_extra == FREE_ON_RESUME}


def differing_fields(a: TrainConfig, b: TrainConfig) -> list[str]:
    """Dotted names of the fields in which two configs would train differently."""
    left, right = flatten(a.model_dump()), flatten(b.model_dump())
    changed = {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}
    return sorted(changed - free_on_resume(type(a)))


def describe(config: TrainConfig) -> str:
    """The whole config, one `name = value` line per field."""
    return "\n".join(f"  {name} = {value}" for name, value in flatten(config.model_dump()).items())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one mapping with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat

"""What a training run is made of: typed, frozen, validated once, saved with the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trainer.errors import TrainError


def _split_commas(value: Any) -> Any:
    """Let `10,16` and `canonical,hflip` stand for lists, so that every field can be set from a shell."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) else value


Timesteps = Annotated[tuple[int, ...], BeforeValidator(_split_commas)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split_commas)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StudentConfig(_Frozen):
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


class GimConfig(_Frozen):
    """The generative injection module (used in distill mode only)."""

    queries: int = Field(default=32, ge=1)  # k
    bridge_layers: int = Field(default=3, ge=0)  # n; 0 hands the teacher tokens to E_f as they are
    infuse_layers: int = Field(default=1, ge=1)  # m
    heads: int | None = Field(default=None, ge=1)  # None: one head per 64 channels
    ffn_ratio: float = Field(default=4.0, gt=0)
    position_embedding: bool = True
    timestep_embedding: bool = True
    token_norm: Literal["layer", "standardize"] = "layer"
    final_norm: bool = True  # LayerNorm on E_D, so that it lives on the scale of a ViT's own output
    mask_student: float = Field(default=0.0, ge=0, le=1)  # probability that E_f sees a mask token instead of E_R
    detach_student: bool = False  # True: E_f reads E_R but sends it no gradient


class LossConfig(_Frozen):
    """L = L_DRC + alpha · L_CAL, and where each of the two acts."""

    tau: float = Field(default=0.05, gt=0)
    alpha: float = Field(default=1.0, ge=0)
    alpha_warmup: float = Field(default=0.0, ge=0, le=1)  # fraction of the run over which alpha grows from 0
    drc_on: Literal["ed", "both"] = "ed"
    drc_student_weight: float = Field(default=1.0, ge=0)  # of the E_R term of drc_on="both"
    share_proxies: bool = True  # drc_on="both": one set of proxies for E_D and E_R
    cal: Literal["raw", "normalized"] = "raw"
    cal_target: Literal["as_trained", "unmasked", "masked"] = "as_trained"
    stop_gradient: bool = False  # True: CAL moves the student only


class OptimConfig(_Frozen):
    """Adam with cosine annealing; learning rates of the parts are multiples of the student's."""

    name: Literal["adam", "adamw"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.0, ge=0, lt=1)  # fraction of all updates
    final_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    grad_clip: float | None = Field(default=None, gt=0)  # largest gradient norm
    gim_lr_scale: float = Field(default=1.0, gt=0)
    proxy_lr_scale: float = Field(default=1.0, gt=0)


class TrainConfig(_Frozen):
    """One run. The same config, cache and kind of machine give the same student."""

    cache: str = ""
    mode: Literal["baseline", "distill"] = "distill"
    seed: int = Field(default=0, ge=0)
    epochs: int = Field(default=30, ge=1)
    updates: int | None = Field(default=None, ge=1)  # when given, ends the run instead of `epochs`
    batch_size: int = Field(default=32, ge=1)
    unlabeled_per_batch: int = Field(default=0, ge=0)  # distill mode: extra rows per batch that only CAL sees
    tap: str = "hidden"
    timesteps: Timesteps | None = None  # None: all that the cache has
    views: Names | None = None  # None: all that the cache has and the trainer can pair
    augment: Literal["none", "color"] = "none"
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the forward pass; weights are always float32
    workers: int = Field(default=0, ge=0)  # 0: one prefetch thread
    threads: int | None = Field(default=None, ge=1)  # None: torch's own choice
    image_memory_gb: float = Field(default=1.0, ge=0)  # decoded images stay in memory up to this
    verify_reads: bool = True  # hold what is read from the cache against its checksums
    log_every: int = Field(default=10, ge=1)  # updates
    eval_every: int = Field(default=0, ge=0)  # epochs; 0: never during training
    checkpoint_every: int = Field(default=1, ge=0)  # epochs; 0: only when interrupted
    student: StudentConfig = StudentConfig()
    gim: GimConfig = GimConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()


# Fields that change neither the numbers nor their order: a run may be resumed with other values of them.
FREE_ON_RESUME = {
    "cache", "device", "workers", "threads", "image_memory_gb", "verify_reads", "log_every", "eval_every",
    "checkpoint_every",
}  # fmt: skip

# Small enough for two CPU cores. The choices below were made by measurement: see benchmarks/README.md.
_SMALL: dict[str, Any] = {
    "student": {
        "name": "vit_tiny_patch16_224",
        "img_size": 96,
        "patch_size": 16,
        "depth": 6,
        "embed_dim": 192,
        "num_heads": 3,
    },
    "gim": {"mask_student": 0.5},
    "loss": {
        "alpha": 10.0,
        "alpha_warmup": 0.3,
        "drc_on": "both",
        "cal": "normalized",
        "cal_target": "masked",
        "stop_gradient": True,
    },
    "optim": {"lr": 5e-4, "warmup": 0.1},
}

# paper: the full setting. small: a small student on any cache, from scratch. demo: small, with unlabelled images.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": _SMALL,
    "demo": {**_SMALL, "unlabeled_per_batch": 32},
}


def make_config(preset: str, settings: Iterable[str] = (), **flags: Any) -> TrainConfig:
    """Build a run's config: preset, then flags, then `settings` such as `student.depth=4`.

    `flags` are dotted field names with `__` for the dot (`loss__alpha=2`); those that are None are not given.
    Raises TrainError that names the field and what it accepts.
    """
    if preset not in PRESETS:
        raise TrainError(f"unknown preset {preset!r}; there are {', '.join(sorted(PRESETS))}")
    values = json.loads(json.dumps(PRESETS[preset]))
    for name, value in flags.items():
        if value is not None:
            _assign(values, name.replace("__", "."), value)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise TrainError(f"--set {setting}: write it as field=value, for example student.depth=4")
        _assign(values, name.strip(), _parse(text.strip()))
    return validate(values)


def validate(values: Mapping[str, Any]) -> TrainConfig:
    """Turn plain values into a TrainConfig; raises TrainError with one line about the first bad field."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "function-before")
        if first["type"] == "extra_forbidden":
            raise TrainError(f"no such field: {field}; `dit-train run --print-config` lists them") from None
        raise TrainError(f"{field}: {first['msg']} (got {first['input']!r})") from None


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the config as indented JSON."""
    path.write_text(config.model_dump_json(indent=2) + "\n")


def load_config(path: Path) -> TrainConfig:
    """Read a config written by `save_config`; raises TrainError when it is not one."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise TrainError(f"{path.parent} is not a run: it has no {path.name}") from None
    except json.JSONDecodeError as error:
        raise TrainError(f"{path} is not JSON: {error}") from None
    return validate(values)


def differing_fields(a: TrainConfig, b: TrainConfig) -> list[str]:
    """Dotted names of the fields in which two configs would train differently."""
    left, right = flatten(a.model_dump()), flatten(b.model_dump())
    changed = {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}
    return sorted(changed - FREE_ON_RESUME)


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


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise TrainError(f"no such field: {dotted} ({parent} has no parts)")
        values = inner
    values[last] = value


def _parse(text: str) -> Any:
    if text.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text

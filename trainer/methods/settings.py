"""From words to the config of a run: a preset, flags, `field=value` settings or a file, for the method they name."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cache_schema.settings import Settings, Values, merge, unflatten
from trainer.config import ALONE, PRESETS, RECOMMENDED_FOR, StudentConfig, TrainConfig
from trainer.errors import TrainError
from trainer.methods.registry import DEFAULT, config_class, method_name
from trainer.runs import read_config

# The fields of a student that say how one network is built.
ARCHITECTURE = ("name", "img_size", "patch_size", "depth", "embed_dim", "num_heads")
# Settings that are read where another one has one of these values; None: where it is not 0.
READ_WITH: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "unlabeled_from": ("unlabeled_per_batch", None),
    **{f"unlabelled.{name}": ("unlabelled.per_batch", None) for name in ("by", "images_from", "threshold", "weight")},
    "loss.memory": ("loss.align", ("memory",)),
    "loss.temperature": ("loss.align", ("relational", "memory")),
    "loss.target_components": ("loss.align_target", ("pooled",)),
    "loss.alpha": ("loss.alpha_by", ("constant",)),
    "loss.alpha_ratio": ("loss.alpha_by", ("gradient_ratio",)),
    "gim.token_components": ("gim.token_norm", ("whiten",)),
}
# Those that say which of `RECOMMENDED_FOR` it is.
_STUDENT = ("name", "pretrained", "weights")


def settings_of(method: str) -> Settings[TrainConfig]:
    """What is done with the configs of a method; raises TrainError for a method that is not there."""
    return _settings_of(method, config_class(method))


def make_config(preset: str, settings: Iterable[str] = (), **flags: Any) -> TrainConfig:
    """Build a run's config: preset, then flags, then `settings` such as `student.depth=4`.

    `flags` are dotted field names with `__` for the dot (`loss__alpha=2`); those that are None are not given. `mode`
    stands for `method`. A preset's student is one network: where another is named, nothing of it applies. Raises
    TrainError that names the field and what it accepts.
    """
    if preset not in PRESETS:
        raise TrainError(f"unknown preset {preset!r}; there are {', '.join(sorted(PRESETS))}")
    method, named, rest = _take_method(flags, settings)
    known = settings_of(method)
    asked = known.given(
        {name: known.parse(name, value) if isinstance(value, str) else value for name, value in named.items()}, rest
    )
    values = merge(PRESETS[preset], known.kind.presets.get(preset, {}))
    if preset == "recommended":
        values = merge(values, _known(RECOMMENDED_FOR.get(_student_kind(values, asked), {}), known.kind))
    if asked.get("student.name") not in (None, preset_student(preset)):
        for name in ARCHITECTURE:  # another network has another
            values.get("student", {}).pop(name, None)
    return known.validate(merge(values, unflatten(asked), {"method": method}))


def _student_kind(values: Values, asked: Values) -> str:
    """Which of `RECOMMENDED_FOR` the student of a config is, "" for the one that the preset itself is for."""
    given = {name: value for name, value in asked.items() if name.startswith("student.")}
    student = StudentConfig.model_validate({**values.get("student", {}), **unflatten(given).get("student", {})})
    if not student.starts_trained:
        return "untrained"
    if student.name == StudentConfig().name:
        return ""
    from trainer.models.student import has_batch_norm

    return "convolutional" if has_batch_norm(student.name) else ""


def require_weights(config: TrainConfig, preset: str | None) -> None:
    """Raise TrainError where a preset that is meant for a pretrained student would start from random weights."""
    if preset == "paper" and not config.student.starts_trained:
        raise TrainError(
            f"preset paper trains a pretrained student: add --pretrained (student.pretrained=true: timm's weights of "
            f"{config.student.name}, from its hub) or --student-weights FILE.safetensors (student.weights=FILE); "
            "--preset small trains one from scratch"
        )


def preset_student(preset: str) -> str | None:
    """The network whose architecture a preset has, if it has one."""
    return PRESETS[preset].get("student", {}).get("name")


def absolute(place: str) -> str:
    """A path that means the same in any folder; a URL is as it was."""
    return place if "://" in place else str(Path(place).resolve())


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """A config whose caches, rival and weights are found from any folder: runs are scored and resumed elsewhere."""
    named = {name: getattr(config, name, None) for name in ("cache", "features", "against")}
    update: dict[str, Any] = {name: absolute(place) for name, place in named.items() if place}
    if config.student.weights:
        weights = absolute(config.student.weights)
        update["student"] = config.student.model_copy(update={"weights": weights})
    return config.model_copy(update=update)


def load_config(path: Path) -> TrainConfig:
    """Read a config written by `save_config`, now or by an older version; raises TrainError when it is not one."""
    values = read_config(path)
    try:
        values = migrate(values)
        return settings_of(str(values.get("method", DEFAULT))).validate(values)
    except TrainError as error:
        raise TrainError(f"{path}: {error}") from None


def without_teacher(config: TrainConfig) -> TrainConfig:
    """The config of the same run by the student alone: what its method has beside that is dropped."""
    kept = _known(config.model_dump(mode="json"), config_class(ALONE))
    return settings_of(ALONE).validate({**kept, "method": ALONE})


def differing_fields(a: TrainConfig, b: TrainConfig) -> list[str]:
    """Dotted names of the fields in which two configs would train differently."""
    if a.method != b.method:
        return ["method"]
    found = settings_of(a.method).differing(with_absolute_paths(a), with_absolute_paths(b))
    return [*found, *(name for name in sorted(a.followed | b.followed) if getattr(a, name) != getattr(b, name))]


def changes(config: TrainConfig, preset: str) -> str:
    """What of a config its preset does not say, one `name = value` line per field."""
    plain = make_config(preset, method=config.method).student
    theirs = {name: getattr(config.student, name) for name in _STUDENT}  # they decide what the preset says of the rest
    base = make_config(preset, method=config.method, **{f"student__{name}": value for name, value in theirs.items()})
    named = base.student.model_copy(update={name: getattr(plain, name) for name in (*_STUDENT, *ARCHITECTURE)})
    base = base.model_copy(update={"cache": config.cache, "student": named})
    return settings_of(config.method).changes(config, base)


def idle_settings(config: TrainConfig, preset: str) -> list[str]:
    """What of a config differs from its preset and yet changes nothing, for another setting leaves it unread."""
    values = settings_of(config.method).flat(config)
    plain = settings_of(config.method).flat(make_config(preset, method=config.method))
    found = []
    for name, (other, wanted) in READ_WITH.items():
        if not values.keys() >= {name, other} or values[name] == plain[name]:
            continue
        if not (values[other] if wanted is None else values[other] in wanted):
            found.append(f"{name} changes nothing while {other} is {values[other]}")
    return found


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config in the present form.

    Until methods had names, a config said `mode`, and held the fields of all modes whatever its own was: what its
    method does not have meant nothing then, and is dropped. Augmentation was one word, of which `color` changed
    colours by 0.3.
    """
    augment = values.get("augment")
    if isinstance(augment, str):
        values = {**values, "augment": {"color": 0.3} if augment == "color" else {}}
    if "mode" not in values:
        return dict(values)
    method = method_name(str(values["mode"]))
    if values.get("tap") == "hidden":  # what an unnamed tap means since
        values = {name: value for name, value in values.items() if name != "tap"}
    kept = _known({name: value for name, value in values.items() if name != "mode"}, config_class(method))
    return {**kept, "method": method}


def _known(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name not in model.model_fields:
            continue
        inner = model.model_fields[name].annotation
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, BaseModel):
            kept[name] = _known(value, inner)
        else:
            kept[name] = value
    return kept


def _take_method(flags: Mapping[str, Any], settings: Iterable[str]) -> tuple[str, Values, list[str]]:
    """The method that flags and settings name, and the rest of both; raises TrainError where they disagree."""
    named = {name.replace("__", "."): value for name, value in flags.items() if value is not None}
    said: dict[str, str] = {name: str(named.pop(name)) for name in ("mode", "method") if name in named}
    rest = []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if equals and name.strip() in ("mode", "method"):
            said[name.strip()] = text.strip()
        else:
            rest.append(setting)
    method = said.get("method")
    if "mode" in said:
        of_mode = method_name(said["mode"])
        if method not in (None, of_mode):
            raise TrainError(f"mode {said['mode']} is method {of_mode}, not {method}; give one of the two")
        method = of_mode
    return method or DEFAULT, named, rest


@functools.cache
def _settings_of(method: str, kind: type[TrainConfig]) -> Settings[TrainConfig]:
    return Settings(kind, command=f"dit-train run --method {method}", example="student.depth=4", error=TrainError)

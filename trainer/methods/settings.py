"""From words to the config of a run: a preset, flags, `field=value` settings or a file, for the method they name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from trainer.config import PRESETS, TrainConfig
from trainer.errors import TrainError
from trainer.methods.registry import DEFAULT, config_class, method_name
from trainer.runs import read_config


def make_config(preset: str, settings: Iterable[str] = (), **flags: Any) -> TrainConfig:
    """Build a run's config: preset, then flags, then `settings` such as `student.depth=4`.

    `flags` are dotted field names with `__` for the dot (`loss__alpha=2`); those that are None are not given. `mode`
    stands for `method`. A preset's student is one network: where another is named, nothing of it applies. Raises
    TrainError that names the field and what it accepts.
    """
    if preset not in PRESETS:
        raise TrainError(f"unknown preset {preset!r}; there are {', '.join(sorted(PRESETS))}")
    asked: dict[str, Any] = {}
    for name, value in flags.items():
        if value is not None:
            _assign(asked, name.replace("__", "."), value)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise TrainError(f"--set {setting}: write it as field=value, for example student.depth=4")
        _assign(asked, name.strip(), _parse(text.strip()))
    method = _take_method(asked)
    values = _merge(PRESETS[preset], config_class(method).presets.get(preset, {}))
    if names_another_student(preset, asked):
        del values["student"]  # another network has another architecture
    return validate({**_merge(values, asked), "method": method})


def names_another_student(preset: str, asked: Mapping[str, Any]) -> bool:
    """Whether nested values ask for another network than the preset's, whose architecture then does not apply."""
    student, own = asked.get("student"), PRESETS[preset].get("student")
    name = student.get("name") if isinstance(student, Mapping) else None
    return own is not None and name is not None and name != own["name"]


def validate(values: Mapping[str, Any]) -> TrainConfig:
    """Turn plain values into the config of their method; raises TrainError with one line about the first bad field."""
    method = str(values.get("method", DEFAULT))
    try:
        return config_class(method).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"] if part != "function-before")
        if first["type"] == "extra_forbidden":
            where = f"(method {method}); `dit-train run --method {method} --print-config` lists them"
            raise TrainError(f"no such field: {field} {where}") from None
        raise TrainError(f"{field}: {first['msg']} (got {first['input']!r})") from None


def load_config(path: Path) -> TrainConfig:
    """Read a config written by `save_config`, now or by an older version; raises TrainError when it is not one."""
    return validate(migrate(read_config(path)))


def migrate(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config in the present form.

    Until methods had names, a config said `mode`, and held the fields of all modes whatever its own was: what its
    method does not have meant nothing then, and is dropped.
    """
    if "mode" not in values:
        return dict(values)
    method = method_name(str(values["mode"]))
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


def _take_method(values: dict[str, Any]) -> str:
    """Take `method` or `mode`, which stands for it, out of the values; raises TrainError where they disagree."""
    mode, method = values.pop("mode", None), values.pop("method", None)
    if mode is None:
        return DEFAULT if method is None else str(method)
    named = method_name(str(mode))
    if method is not None and method != named:
        raise TrainError(f"mode {mode} is method {named}, not {method}; give one of the two")
    return named


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` winning."""
    merged = {name: _merge(value, {}) if isinstance(value, Mapping) else value for name, value in below.items()}
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


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

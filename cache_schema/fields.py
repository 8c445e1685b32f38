"""What is said about the fields of a configuration, once, beside each: help, limits, whether it may change on resume.

A configuration is a frozen dataclass or a frozen Pydantic model, and so are its parts. No Pydantic is imported here:
the help of a command is made from these fields and is to be there at once.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from cache_schema.errors import DitDistillError


class SettingsError(DitDistillError):
    """A setting that does not exist or cannot have this value; the message names it and what it accepts."""


@dataclass(frozen=True)
class Setting:
    """What there is to say about a field, beside its type and its default.

    help: a sentence. least, most: inclusive limits; above: exclusive. resumable: whether an interrupted piece of work
    goes on with another value of it, because its result does not depend on it. option: how the option is called, where
    not like the field. reads: text as typed → plain value, for what has a notation of its own (raises ValueError).
    metavar: what help shows for the value of the option, and shown for its default ("" for nothing).
    """

    help: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    resumable: bool = False
    option: str | None = None
    reads: Callable[[str], Any] | None = None
    metavar: str | None = None
    shown: str | None = None

    def check(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence; words are not compared with limits."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        too_small = self.least is not None and not value >= self.least
        too_large = self.most is not None and not value <= self.most
        if self.above is not None and not value > self.above:
            return f"must be {'positive' if self.above == 0 else f'more than {self.above}'}, not {value}"
        if (too_small or too_large) and self.least is not None and self.most is not None:
            return f"must lie from {self.least} to {self.most}, not {value}"
        if too_small:
            return f"must be at least {self.least}, not {value}"
        return f"must be at most {self.most}, not {value}" if too_large else None


@dataclass(frozen=True)
class FieldSpec:
    """A field of a configuration: its dotted name, type, default (`dataclasses.MISSING` if required), what is said."""

    name: str
    kind: Any
    default: Any
    setting: Setting

    @property
    def option(self) -> str:
        """The option of the command line: `--box-threshold` for `annotate.box_threshold`."""
        return self.setting.option or "--" + self.name.rpartition(".")[2].replace("_", "-")


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a type where it is a union, else the type alone; what annotates them is left out."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(get_args(member)[0] if get_origin(member) is Annotated else member for member in members)


def fields_of(kind: type, prefix: str = "") -> dict[str, FieldSpec]:
    """Every field of a configuration class and its parts by dotted name."""
    found: dict[str, FieldSpec] = {}
    for name, inner, default, setting in _own_fields(kind):
        if _is_part(inner):
            found |= fields_of(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = FieldSpec(prefix + name, inner, default, setting)
    return found


def check_limits(config: object, error: type[DitDistillError] = SettingsError) -> None:
    """Raise for the first field of a configuration whose value its `Setting` does not allow; parts check themselves."""
    kind: Any = type(config)
    for name, field in _limited(kind).items():
        wrong = field.setting.check(getattr(config, name))
        if wrong:
            raise error(f"{field.option} {wrong}")


@functools.cache
def _limited(kind: Any) -> dict[str, FieldSpec]:
    return {
        name: FieldSpec(name, inner, default, setting)
        for name, inner, default, setting in _own_fields(kind)
        if (setting.least, setting.most, setting.above) != (None, None, None)
    }


def _own_fields(kind: Any) -> Iterable[tuple[str, Any, Any, Setting]]:
    """Name, type, default and setting of the fields of one class, without its parts'."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            hint = hints[field.name]
            inner, *said = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            made = field.default_factory
            yield field.name, inner, field.default if made is dataclasses.MISSING else made(), _setting_in(said)
    else:
        for name, info in kind.model_fields.items():
            default = dataclasses.MISSING if info.is_required() else info.get_default(call_default_factory=True)
            yield name, info.annotation, default, _setting_in(info.metadata, info.description or "")


def _setting_in(said: Iterable[Any], description: str = "") -> Setting:
    """The one Setting among what annotates a field, with limits that Pydantic's own constraints state."""
    said = tuple(said)
    setting = next((each for each in said if isinstance(each, Setting)), Setting(help=description))
    stated = {
        ours: getattr(each, theirs)
        for each in said
        for ours, theirs in (("least", "ge"), ("most", "le"), ("above", "gt"))
        if not isinstance(each, Setting) and getattr(each, theirs, None) is not None
    }
    return dataclasses.replace(setting, **stated)


def _is_part(kind: Any) -> bool:
    return isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "model_fields"))

"""One way to say a setting: typed, frozen configurations, whose fields have dotted names wherever they are given.

A configuration is a frozen dataclass or a frozen Pydantic model; its parts are such classes too. What there is to say
about a field is said once, beside it, by a `Setting`. `Settings` does the rest: presets, flags, `--set field=value` and
files in that order of precedence, unknown names refused with the nearest valid one, one line per error.

    @dataclass(frozen=True)
    class Loss:
        tau: Annotated[float, Setting("Temperature.", above=0)] = 0.05
        target: Literal["masked", "unmasked"] = "unmasked"

        def __post_init__(self) -> None:
            check_limits(self)

    class Train(BaseModel, frozen=True, extra="forbid"):
        epochs: Annotated[int, Setting("Passes over the images.", least=1)] = 30
        workers: Annotated[int, Setting("Loader processes.", least=0, resumable=True)] = 0
        timesteps: tuple[int, ...] | None = None
        loss: Loss = Loss()

    SETTINGS = Settings(Train, command="dit-train run", example="loss.tau=0.1")
    config = SETTINGS.make({"epochs": 3}, {"loss__tau": 0.1}, ["timesteps=10,16", "loss.target=masked"])
    SETTINGS.make({}, {}, ["loss.tua=1"])        # no such field: loss.tua; did you mean loss.tau? …
    SETTINGS.make({}, {}, ["loss.tau=-1"])       # --tau must be positive, not -1.0
    SETTINGS.differing(config, other)            # ["epochs"]; never "workers", which may change on resume
    SETTINGS.changes(config, SETTINGS.make({}))  # what differs from a preset, a line per field
    path.write_text(SETTINGS.render(config))     # JSON, which SETTINGS.load(path) reads

`check_limits` holds a dataclass to its limits however it is made; a Pydantic model states its own with `Field(ge=…)`,
which says them to the options too. Options of a command are made from the same fields by `cache_schema.options`.
Pydantic is imported by what validates, so that help can be shown without it.
"""

import dataclasses
import difflib
import functools
import json
import os
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args, get_origin

from cache_schema.errors import DitDistillError
from cache_schema.fields import FieldSpec, Setting, SettingsError, alternatives, check_limits, fields_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Values = dict[str, Any]
# A flag that was typed as none: where a preset says something else, None would be taken for what was not typed.
TYPED_NONE = object()
C = TypeVar("C")

__all__ = ["FieldSpec", "Setting", "Settings", "SettingsError", "check_limits", "flatten", "merge", "unflatten"]


class Settings(Generic[C]):
    """Everything that is done with configurations of one class.

    command: whose `--print-config` lists the fields and whose files are read. example: a setting, for messages. error:
    what is raised.
    """

    def __init__(
        self, kind: type[C], *, command: str, example: str, error: type[DitDistillError] = SettingsError
    ) -> None:
        self.kind, self.command, self.example, self.error = kind, command, example, error

    @functools.cached_property
    def fields(self) -> dict[str, FieldSpec]:
        """Every field by its dotted name, in the order of the classes."""
        return fields_of(self.kind)

    def field(self, name: str) -> FieldSpec:
        """A field by its dotted name, or by one within a field that is a table. Raises with the nearest name."""
        known = self.fields
        if name in known:
            return known[name]
        table = next((f for other, f in known.items() if name.startswith(f"{other}.") and _is_table(f.kind)), None)
        if table is not None:
            return FieldSpec(name, get_args(table.kind)[1], dataclasses.MISSING, Setting())
        inside = [other for other in known if other.startswith(f"{name}.")]
        if inside:
            raise self.error(f"{name} is a group of settings; name one of them, for example {inside[0]}")
        close = difflib.get_close_matches(name, known, n=1) or [
            other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]
        ]
        hint = f"did you mean {close[0]}? " if close else ""
        raise self.error(f"no such field: {name}; {hint}`{self.command} --print-config` lists them")

    def parse(self, name: str, text: str) -> Any:
        """What was typed for a field as a plain value. Raises with what the field accepts."""
        field = self.field(name)
        if field.setting.reads is not None and not _means_none(text, field):
            try:
                return field.setting.reads(text)
            except ValueError as error:
                raise self.error(f"{name}: {error}") from None
        return parse_value(text, field.kind)

    def accept(self, name: str, text: str) -> Any:
        """What was typed for one field as a plain value, checked; raises ValueError with what the field accepts."""
        from pydantic import TypeAdapter, ValidationError

        field = self.field(name)
        reads = field.setting.reads
        value = reads(text) if reads and not _means_none(text, field) else parse_value(text, field.kind)
        try:
            TypeAdapter(field.kind).validate_json(json.dumps(value, default=_plain), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{first['msg']} (got {first['input']!r})") from None
        wrong = field.setting.check(value)
        if wrong:
            raise ValueError(wrong)
        return value

    def read(self, settings: Iterable[str]) -> Values:
        """Settings such as `refine.steps=200` as plain values by dotted name; the last of a name counts."""
        found: Values = {}
        for setting in settings:
            name, equals, text = setting.partition("=")
            if not equals:
                raise self.error(f"--set {setting}: write it as field=value, for example {self.example}")
            found[name.strip()] = self.parse(name.strip(), text.strip())
        return found

    def given(self, flags: Mapping[str, Any], settings: Iterable[str] = ()) -> Values:
        """Flags and settings, which have the last word, as plain values by dotted name.

        flags: by field, with `__` or a dot between the parts (`refine__steps`); None is for what is not given, and
        `TYPED_NONE` for a value that is none.
        """
        typed = {name.replace("__", "."): value for name, value in flags.items() if value is not None}
        named = {name: None if value is TYPED_NONE else value for name, value in typed.items()}
        for name in named:
            self.field(name)
        return named | self.read(settings)

    def make(
        self, preset: Mapping[str, Any], flags: Mapping[str, Any] | None = None, settings: Iterable[str] = ()
    ) -> C:
        """A configuration: nested plain values, then flags, then settings. Raises one line on the first wrong field."""
        return self.validate(unflatten(self._known(preset) | self.given(flags or {}, settings)))

    def validate(self, values: Mapping[str, Any]) -> C:
        """Turn nested plain values into a configuration. Raises one line that names the first wrong field."""
        from pydantic import ValidationError

        plain = unflatten(self._known(values))
        try:
            # By way of JSON, because Pydantic's strict mode takes lists for tuples and text for paths only there.
            return self._adapter.validate_json(json.dumps(plain, default=_plain), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # of the whole: fields that do not go together, which its message names
                raise self.error(str(first["msg"]).removeprefix("Value error, ")) from None
            raise self.error(f"{self._name_of(first['loc'])}: {first['msg']} (got {first['input']!r})") from None

    def plain(self, config: C) -> Values:
        """A configuration as nested plain values, as JSON has them."""
        return self._adapter.dump_python(config, mode="json")

    def flat(self, config: C) -> Values:
        """A configuration as plain values by dotted name."""
        return flatten(self.plain(config))

    def render(self, config: C) -> str:
        """A configuration as indented JSON, which `load` reads."""
        return json.dumps(self.plain(config), indent=2)

    def load(self, path: Path) -> C:
        """Read a configuration; fields that it does not name have their defaults, and a path may begin with `~`.

        Every error names the file.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("not an object of settings")
        except FileNotFoundError:
            raise self.error(f"{path}: there is no such configuration file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise self.error(f"{path}: not a configuration that {self.command} saved ({error})") from None
        try:
            return self.validate(_at_home(values))
        except DitDistillError as error:
            raise self.error(f"{path}: {error}") from None

    def resumable(self) -> set[str]:
        """Names of the fields that may change on resume."""
        return {name for name, field in self.fields.items() if field.setting.resumable}

    def differing(self, a: C, b: C) -> list[str]:
        """Names of the fields in which two configurations differ, but for those that may change on resume."""
        left, right = self.flat(a), self.flat(b)
        changed = {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)}
        return sorted(changed - self.resumable())

    def describe(self, config: C) -> str:
        """The whole configuration, one `name = value` line per field."""
        return "\n".join(f"  {name} = {value}" for name, value in self.flat(config).items())

    def changes(self, config: C, base: C) -> str:
        """What differs from another configuration, such as a preset's: one line per field, with both values."""
        before = self.flat(base)
        return "\n".join(
            f"  {name} = {value} (not {before.get(name)})"
            for name, value in self.flat(config).items()
            if name not in before or value != before[name]
        )

    @functools.cached_property
    def _adapter(self) -> "TypeAdapter[C]":
        from pydantic import TypeAdapter

        return TypeAdapter(self.kind)

    def _known(self, values: Mapping[str, Any]) -> Values:
        """Nested values by dotted name, every one of them a field's."""
        flat = flatten(values)
        groups = {name for field in self.fields for name in _parents(field)}
        for name, value in flat.items():
            if not (name in groups and value == {}):
                self.field(name)
        return flat

    def _name_of(self, location: tuple[int | str, ...]) -> str:
        """The dotted name of the field in which Pydantic found an error; what follows it is the branch of a union."""
        names = [".".join(map(str, location[:n])) for n in range(len(location), 0, -1)]
        return next((name for name in names if name in self.fields), names[-1])


def _is_table(kind: Any) -> bool:
    return get_origin(kind) is dict


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def flatten(values: Mapping[str, Any], prefix: str = "") -> Values:
    """Nested values as one mapping with dotted names; an empty mapping is a value."""
    flat: Values = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Values:
    """Dotted names as nested values: what `flatten` undoes."""
    values: Values = {}
    for dotted, value in flat.items():
        *parents, last = dotted.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = {} if value == {} else value  # a table that may grow is not the giver's own
    return values


def merge(*layers: Mapping[str, Any]) -> Values:
    """Nested values of which later ones replace earlier ones, field by field."""
    merged: Values = {}
    for layer in layers:
        for name, value in layer.items():
            before = merged.get(name)
            nested = isinstance(value, Mapping)
            merged[name] = merge(before if isinstance(before, Mapping) else {}, value) if nested else value
    return merged


def _means_none(text: str, field: FieldSpec) -> bool:
    return text.lower() == "none" and types.NoneType in alternatives(field.kind)


def parse_value(text: str, kind: Any) -> Any:
    """Text from a shell as a plain value for a field of a type: numbers, true, none, and a,b,c for several."""
    options = alternatives(kind)
    literals = {value for option in options if get_origin(option) is Literal for value in get_args(option)}
    if text in literals:
        return text
    if text.lower() == "none" and types.NoneType in options:
        return None
    for option in options:
        if get_origin(option) is tuple:
            parts = text.strip("[]").split(",")
            return [parse_value(part.strip(), get_args(option)[0]) for part in parts if part.strip()]
    numbers = {int, float, bool} & set(options)
    if (str in options or Path in options or literals) and not numbers:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _at_home(value: Any) -> Any:
    """Plain values with the homes in paths, as a shell would have put them into options."""
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    if isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)  # noqa: PTH111 - Path refuses unknown users
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a plain value")

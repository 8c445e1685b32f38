"""What the heavy job is made of, from data set to cache: one typed, frozen value, checked once, saved with its results.

`RunConfig` is the whole; its parts lie beside what they configure. Presets (`pipeline.presets`), a saved file, options
and `--set` all end here, so that a setting means the same wherever it is given.
"""

import dataclasses
import difflib
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, Union, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from cache_schema.errors import DitDistillError
from cache_schema.storage.files import write_file
from pipeline.annotate.config import AnnotateConfig
from pipeline.build.config import BuildConfig
from pipeline.device import DtypeName
from pipeline.inputs.tolerance import Tolerance
from pipeline.presets import preset_values
from pipeline.probe.run import ProbeConfig
from pipeline.refine.config import RefineConfig
from pipeline.teachers.base import ContextMode, EncoderInput

Step: TypeAlias = Literal["annotate", "refine", "probe", "build", "verify"]
STEPS: tuple[Step, ...] = get_args(Step)


class ConfigError(DitDistillError):
    """A setting that does not exist or cannot have this value; the message names it and what it accepts."""


@dataclass(frozen=True)
class DataOptions:
    """Which images. root: directory of the data set, None data/<name>. limit: only the first N images of each split.

    train_classes, train_ratio, superclass: for data sets without a protocol of their own. annotations: a file of boxes
    and captions that stand in for the data set's own.
    """

    name: str
    root: Path | None = None
    limit: int | None = None
    train_classes: tuple[str, ...] | None = None
    train_ratio: float | None = None
    superclass: str | None = None
    annotations: Path | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit must be at least 1, not {self.limit}")


@dataclass(frozen=True)
class TeacherOptions:
    """Which teacher (preset, diffusers folder or hub repository), and how it runs.

    resolution: side of its views in pixels, None the preset's. guidance: for teachers whose configuration embeds it.
    context: how the clean context enters, None as the teacher was trained. input: what an image encoder is shown.
    quantize, offload, compile: see `pipeline.teachers.loading.Loading`; Stage I does not offload, because its gradients
    need the whole transformer.
    """

    name: str
    revision: str | None = None
    resolution: int | None = None
    guidance: float = 3.5
    context: ContextMode | None = None
    input: EncoderInput = "object"
    quantize: Literal["none", "int8", "fp8"] = "none"
    offload: bool = False
    compile: bool = False
    dtype: DtypeName = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class RunConfig:
    """Everything from a data set to its cache. steps: what `dit-cache run` does, in this order.

    conditions: folder of prompt embeddings and latents (`pipeline.inputs.condition_store`), None beside the results.
    """

    data: DataOptions
    teacher: TeacherOptions
    steps: tuple[Step, ...] = ("annotate", "refine", "build", "verify")
    conditions: Path | None = None
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    tolerance: Tolerance = field(default_factory=Tolerance)

    def __post_init__(self) -> None:
        if not self.steps or [s for s in STEPS if s in self.steps] != list(self.steps):
            raise ConfigError(f"steps: name one or more of {', '.join(STEPS)}, each once and in this order")


def make_config(
    dataset: str | None = None,
    teacher: str | None = None,
    settings: Iterable[str] = (),
    saved: Path | None = None,
    **flags: Any,
) -> RunConfig:
    """A configuration: presets or a saved file, then flags, then settings such as `refine.steps=200`.

    dataset, teacher: names; they choose the presets (None: the demo, the data set's teacher), or replace those of the
    saved file. `flags` are field names with `__` for the dot (`refine__steps=200`); None is for what is not given.
    Raises ConfigError, or the part's own error, with one line about the first field that is wrong.
    """
    given: dict[str, Any] = {}
    for flag, value in flags.items():
        if value is not None:
            _assign(given, flag.replace("__", "."), value)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write it as field=value, for example refine.steps=200")
        _assign(given, name.strip(), parse_value(text.strip(), _field_type(name.strip())))
    dataset = given.get("data", {}).get("name", dataset)
    teacher = given.get("teacher", {}).get("name", teacher)
    if saved is None:
        values = preset_values(dataset or "demo", teacher)
    else:
        values = plain_values(load_config(saved))
        values["data"]["name"] = dataset or values["data"]["name"]
        values["teacher"]["name"] = teacher or values["teacher"]["name"]
    for name, value in flatten(given).items():
        _assign(values, name, value)
    return validate(values)


def validate(values: Mapping[str, Any]) -> RunConfig:
    """Turn nested plain values into a RunConfig. Raises as `make_config`."""
    for name in flatten(values):
        _field_type(name)
    try:
        # By way of JSON, because Pydantic's strict mode takes lists for tuples and text for paths only there.
        return _adapter().validate_json(json.dumps(values, default=_plain), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{_name_of(first['loc'])}: {first['msg']} (got {first['input']!r})") from None


def plain_values(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values, as JSON has them."""
    return cast(dict[str, Any], _adapter().dump_python(config, mode="json"))


def render_config(config: RunConfig) -> str:
    """The configuration as indented JSON, which `load_config` reads."""
    return json.dumps(plain_values(config), indent=2)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the configuration, whole or not at all."""
    write_file(path, (render_config(config) + "\n").encode())


def load_config(path: Path) -> RunConfig:
    """Read a configuration; fields that it does not name have their defaults. Raises ConfigError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object of settings")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a configuration that dit-cache run saved ({error})") from None
    try:
        return validate(values)
    except DitDistillError as error:
        raise ConfigError(f"{path}: {error}") from None


def describe(config: RunConfig) -> str:
    """The whole configuration, one `name = value` line per field."""
    return "\n".join(f"  {name} = {value}" for name, value in flatten(plain_values(config)).items())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values as one mapping with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def parse_value(text: str, kind: Any) -> Any:
    """Text from a shell as a plain value for a field of a type: numbers, true, none, and a,b,c for several."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    literals = {value for option in options if get_origin(option) is Literal for value in get_args(option)}
    if text in literals:
        return text
    if text.lower() == "none" and types.NoneType in options:
        return None
    for option in options:
        if get_origin(option) is tuple:
            parts = text.strip("[]").split(",")
            return [parse_value(part.strip(), get_args(option)[0]) for part in parts if part.strip()]
    if str in options or Path in options or (literals and int not in options):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text)
    except ValueError:
        return text


@cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


@cache
def field_types() -> dict[str, Any]:
    """Dotted name of every field → its type."""
    return {
        f"{part}.{name}" if dataclasses.is_dataclass(kind) else part: inner
        for part, kind in get_type_hints(RunConfig).items()
        for name, inner in (get_type_hints(kind).items() if dataclasses.is_dataclass(kind) else [(part, kind)])
    }


def _field_type(name: str) -> Any:
    """The type of a field; raises ConfigError, with the closest name, where there is none."""
    known = field_types()
    if name in known:
        return known[name]
    inside = [other for other in known if other.startswith(f"{name}.")]
    if inside:
        raise ConfigError(f"{name} is a group of settings; name one of them, for example {inside[0]}")
    close = difflib.get_close_matches(name, known, n=1) or [
        other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"no such field: {name}; {hint}`dit-cache run --print-config` lists them")


def _name_of(location: tuple[int | str, ...]) -> str:
    """The dotted name of the field in which Pydantic found an error; what follows it is the branch of a union."""
    names = [".".join(map(str, location[:n])) for n in (2, 1)]
    return next((name for name in names if name in field_types()), names[-1])


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    _field_type(dotted)
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not a plain value")

"""Options of a command line, made from the fields of a configuration: written once, beside the field.

    @with_options(SETTINGS, ["loop.epochs", Exposed("loss.tau", "--temperature")])
    def train(given: Values, output: Path) -> None:
        config = SETTINGS.make(preset, given)

`train` has the options --epochs and --temperature beside its own. It is called with those that were typed, as plain
values by the names of their fields; what was not typed is not there, so that presets and saved files say what it is.
A choice among words, limits and the default are shown by help and checked by typer, and a value with a notation of its
own is read as `--set` reads it: anything that a field does not accept is wrong usage, exit code 2.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from cache_schema.fields import FieldSpec, alternatives
from cache_schema.settings import TYPED_NONE, Settings, Values

Command = Callable[..., None]
# A field and what is said of it → what help shows as its default, and what it says.
Described = Callable[[FieldSpec, str], tuple[str | None, str]]


@dataclass(frozen=True)
class Exposed:
    """A field as an option of one command, where that differs from what is said beside the field.

    option: its name, with "--x/--no-x" for a flag of two. help: another sentence. reads: another notation, instead of
    the field's (raises ValueError). default: what it is where it is not typed, if the command itself says so. shown:
    what help says instead of the default, "" for nothing. also: fields that get the same value.
    """

    field: str
    option: str | None = None
    help: str | None = None
    reads: Callable[[str], Any] | None = None
    default: Any = None
    shown: str | None = None
    also: tuple[str, ...] = ()


def default_of(field: FieldSpec, sentence: str) -> tuple[str | None, str]:
    """What help shows where there are no presets: the default beside the field."""
    return in_words(field, field.default), sentence


def in_words(field: FieldSpec, value: Any) -> str | None:
    """A default as it would be typed; None where there is nothing to show."""
    if field.setting.shown is not None:
        return field.setting.shown or None
    if value is None or value is False or value is dataclasses.MISSING:
        return None
    if value is True:
        return field.option.removeprefix("--")
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def with_options(
    settings: Settings[Any],
    exposed: Iterable[str | Exposed],
    described: Described = default_of,
) -> Callable[[Command], Command]:
    """Give a command an option for each field; its first parameter takes what was typed, by field.

    described: what help shows as the default of a field, and what it says.
    """
    chosen = [Exposed(each) if isinstance(each, str) else each for each in exposed]

    def decorate(command: Command) -> Command:
        made = [_option(settings, each, described) for each in chosen]
        options = {parameter.name: (each, parameter) for each, parameter in zip(chosen, made, strict=True)}
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given: Values = {}
            for name, (each, _) in options.items():
                value = values.pop(name)
                if value is not None:
                    given |= dict.fromkeys((each.field, *each.also), value)
            command(given, **values)

        parameters = [*(parameter for _, parameter in options.values()), *own]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword}
        return run

    return decorate


def _option(settings: Settings[Any], exposed: Exposed, described: Described) -> inspect.Parameter:
    """A parameter that typer makes an option of; None, unless it has a default of its own, is for what is not typed."""
    field = settings.field(exposed.field)
    declared = exposed.option or field.option
    name = declared.strip(" /").partition("/")[0].removeprefix("--").replace("-", "_")
    if field.kind in (bool, bool | None) and exposed.option is None and field.default is not False:
        declared = f"{declared}/--no-{declared.removeprefix('--')}"
    shown, sentence = described(field, exposed.help or field.setting.help)
    shown = shown if exposed.shown is None else exposed.shown
    kind, reads = _option_type(settings, field, exposed)
    info = typer.Option(
        declared,
        help=sentence,
        show_default=True if exposed.default is not None else shown or False,
        parser=reads,
        metavar=field.setting.metavar if reads is None else field.setting.metavar or _metavar(field),
        **({} if reads else _limits(field)),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=exposed.default, annotation=Annotated[kind | None, info]
    )


def _option_type(
    settings: Settings[Any], field: FieldSpec, exposed: Exposed
) -> tuple[Any, Callable[[str], Any] | None]:
    """The type by which typer reads an option, or the function that reads it."""
    kinds = [kind for kind in alternatives(field.kind) if kind is not type(None)]
    simple = len(kinds) == 1 and (kinds[0] in (bool, int, float, str, Path) or get_origin(kinds[0]) is Literal)
    if simple and exposed.reads is None and field.setting.reads is None and field.setting.above is None:
        return kinds[0], None

    def read(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        try:
            value = exposed.reads(text) if exposed.reads else settings.accept(field.name, text)
            return TYPED_NONE if value is None else value
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=exposed.option or field.option) from None

    return str, read


def _metavar(field: FieldSpec) -> str:
    """What stands for a value that typer does not read itself."""
    kinds = [kind for kind in alternatives(field.kind) if kind is not type(None)]
    if get_origin(kinds[0]) is tuple:
        return "N,N,…" if get_args(kinds[0])[0] is int else "A,B,…"
    return f"<{kinds[0].__name__}>"


def _limits(field: FieldSpec) -> dict[str, Any]:
    """The inclusive limits of a number, for typer."""
    if not {int, float} & set(alternatives(field.kind)):
        return {}
    return {"min": field.setting.least, "max": field.setting.most}

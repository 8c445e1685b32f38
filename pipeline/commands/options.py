"""Which fields of the configuration the commands of `dit-cache` share as options. Nothing heavy is imported.

An option that is a field is there only where it was typed: presets say what it is then, and help says what they say.
"""

from collections.abc import Callable
from typing import Annotated

import typer

from cache_schema import options
from cache_schema.fields import FieldSpec
from cache_schema.options import Command, Exposed
from cache_schema.settings import flatten
from pipeline.config import SETTINGS
from pipeline.datasets import dataset_names
from pipeline.presets import DATASETS, TEACHERS, TIMM_PREFIX, VAE_PREFIX, preset_values

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]

DATASET = Exposed("data.name", help=f"Data set: {', '.join(dataset_names())}; demo is built in.", default="demo")
IMAGES: list[str | Exposed] = ["data.root", "data.train_classes", "data.train_ratio", "data.superclass"]
ANNOTATIONS = "data.annotations"
LIMIT = "data.limit"
TEACHER: list[str | Exposed] = [
    Exposed(
        "teacher.name",
        help=f"Preset ({', '.join(TEACHERS)}), diffusers folder, hub repository, image encoder {TIMM_PREFIX}NAME, or "
        f"{VAE_PREFIX}NAME for the VAE alone.",
    ),
    "teacher.revision",
]
# How a teacher runs, in two halves: Stage I does not offload, and what is run alone need not be compiled.
PRECISION: list[str | Exposed] = ["teacher.dtype", "teacher.device"]
FORWARD: list[str | Exposed] = [
    "teacher.resolution", "teacher.guidance", "teacher.context", "teacher.input", "teacher.crop",
    "teacher.quantize",
]  # fmt: skip
CONDITIONS = "conditions"


def configured_by(*exposed: str | Exposed) -> Callable[[Command], Command]:
    """Give a command options for fields of the configuration; it is called with what was typed, by field."""
    return options.with_options(SETTINGS, exposed, described)


def described(field: FieldSpec, sentence: str) -> tuple[str | None, str]:
    """What help shows as the default of a field, and its sentence, which says where presets differ from that."""
    if field.name in ("data.name", "teacher.name"):
        return None, sentence
    usual = _preset_value("", field)
    differing = {name: value for name in DATASETS if (value := _preset_value(name, field)) != usual}
    if not differing:
        return options.in_words(field, usual), sentence
    defaults = [_in_words(field, usual), *(f"{name} {_in_words(field, value)}" for name, value in differing.items())]
    return None, f"{sentence.removesuffix('.')}; default {', '.join(defaults)}."


def _in_words(field: FieldSpec, value: object) -> str:
    """A default as it would be typed, also where it is one that need not be."""
    said = f"no-{field.option.removeprefix('--')}" if value is False else "none"
    return options.in_words(field, value) or said


def _preset_value(dataset: str, field: FieldSpec) -> object:
    value = flatten(preset_values(dataset)).get(field.name, field.default)
    return tuple(value) if isinstance(value, list) else value

"""A teacher without weights: the real classes at their real size on the meta device, to be counted and measured."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from pipeline.teachers import TeacherOutline, adapter_class
from pipeline.teachers.architecture import INDEX_NAME, read_config
from pipeline.teachers.base import ContextMode, Quantization, TeacherError
from pipeline.teachers.quantization import quantize

if TYPE_CHECKING:
    from pipeline.teachers.diffusers_teacher import DiffusersTeacher

META = torch.device("meta")


def weightless_teacher(
    outline: TeacherOutline,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    context: ContextMode | None = None,
) -> "DiffusersTeacher":
    """The family's own teacher, its components made of configurations alone, each when it is first used.

    dtype: of the weights; quantization: of the transformer's linear layers; context: None as the family was trained. It
    runs, and what it returns has shapes but no values; captions cannot be encoded, as there are no tokenizers. Raises
    TeacherError if a configuration is missing or does not fit its class.
    """
    index = read_config(outline.configs, INDEX_NAME, outline.revision)
    there = {name for name, value in index.items() if isinstance(value, list) and value[-1] is not None}

    def read_folder(teacher: Any, names: Sequence[str]) -> _Components:
        made = {name: _component(outline, index[name], name, dtype) for name in names if name in there}
        if quantization and "transformer" in made:
            quantize(made["transformer"], quantization)
        return _Components(dict.fromkeys(teacher.components) | made)

    adapter = adapter_class(outline.adapter)
    hooks = {"_find_absent": lambda teacher: set(teacher.components) - there, "_read_folder": read_folder}
    return type("Weightless", (adapter,), hooks)(
        outline.configs,
        source=outline.source,
        resolution=outline.resolution,
        dtype=dtype,
        device=META,
        context=context,
    )


class _Components(SimpleNamespace):
    """What a `DiffusionPipeline` is to a teacher that is not asked for text: its components by name."""

    def __init__(self, components: Mapping[str, Any]):
        super().__init__(**components)
        self.components = components

    def to(self, _device: Any) -> "_Components":
        return self


def _component(outline: TeacherOutline, kind: list[str], name: str, dtype: torch.dtype) -> Any:
    """A component of a pipeline on the meta device; kind: library and class, as model_index.json names them."""
    if name.startswith("tokenizer"):
        config = read_config(outline.configs, f"{name}/tokenizer_config.json", outline.revision)
        return SimpleNamespace(model_max_length=int(config.get("model_max_length", 1e9)))
    if name == "scheduler":
        return None  # it has no weights
    library, class_name = kind
    config = read_config(outline.configs, f"{name}/config.json", outline.revision)
    try:
        component = getattr(import_module(library), class_name)
        with META:
            if library == "diffusers":
                module = component.from_config(config)
            else:
                module = component(component.config_class.from_dict(config))
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise TeacherError(
            f"teacher {outline.source}: no {library}.{class_name} for {name}/config.json ({str(error).splitlines()[0]})"
        ) from None
    # The libraries' own method of this name warns of layers that none of these has.
    return Module.to(module, dtype)

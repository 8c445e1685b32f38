"""A teacher without weights: the real classes at their real size on the meta device, to be counted and measured."""

from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from pipeline.teachers import TeacherOutline, adapter_class
from pipeline.teachers.architecture import INDEX_NAME, read_config
from pipeline.teachers.base import TeacherError
from pipeline.teachers.quantization import Quantization, quantize

if TYPE_CHECKING:
    from pipeline.teachers.diffusers_teacher import DiffusersTeacher

META = torch.device("meta")


class WeightlessParts:
    """The components of a teacher as `DiffusionPipeline` would hold them, made of configurations alone.

    Each is made anew when it is asked for. dtype: of the weights; quantization: of the transformer's linear layers.
    Raises TeacherError if a configuration is missing or does not fit its class.
    """

    def __init__(self, outline: TeacherOutline, dtype: torch.dtype, quantization: Quantization | None = None):
        self.outline, self.dtype, self.quantization = outline, dtype, quantization
        index = read_config(outline.configs, INDEX_NAME, outline.revision)
        self._classes = {name: v for name, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}

    @property
    def text_encoders(self) -> list[str]:
        return sorted(name for name in self._classes if name.startswith("text_encoder"))

    def class_name(self, name: str) -> str:
        return str(self._classes[name][1])

    def module(self, name: str) -> Any:
        """A component on the meta device, frozen, in the precision in which it would be loaded."""
        library, class_name = self._classes[name]
        config = read_config(self.outline.configs, f"{name}/config.json", self.outline.revision)
        try:
            component = getattr(import_module(library), class_name)
            with META:
                if library == "diffusers":
                    module = component.from_config(config)
                else:
                    module = component(component.config_class.from_dict(config))
        except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise TeacherError(
                f"teacher {self.outline.source}: no {library}.{class_name} for {name}/config.json "
                f"({str(error).splitlines()[0]})"
            ) from None
        # The method of this name that the libraries' models have warns of layers that none here has.
        Module.to(module, self.dtype)
        module.eval().requires_grad_(False)
        if name == "transformer" and self.quantization:
            quantize(module, self.quantization)
        return module

    def text_length(self, name: str) -> int:
        """Tokens that the tokenizer of a text encoder pads or cuts a caption to, unless fewer are asked for."""
        tokenizer = name.replace("text_encoder", "tokenizer")
        config = read_config(self.outline.configs, f"{tokenizer}/tokenizer_config.json", self.outline.revision)
        return int(config.get("model_max_length", 1e9))


def weightless_teacher(parts: WeightlessParts) -> "DiffusersTeacher":
    """The family's own teacher around weightless components; it runs, and what it returns has shapes but no values.

    Its text encoders and tokenizers are left out.
    """
    outline = parts.outline
    adapter = adapter_class(outline.adapter)
    tokenizers = {
        name.replace("text_encoder", "tokenizer"): SimpleNamespace(model_max_length=parts.text_length(name))
        for name in parts.text_encoders
    }

    def load_pipeline(_teacher: Any) -> Any:
        modules = {"transformer": parts.module("transformer"), "vae": parts.module("vae")}
        unused = {name: SimpleNamespace() for name in parts.text_encoders}
        # The third of SD3 may be absent; its place is asked for all the same.
        optional = {"tokenizer_3": None, "text_encoder_3": None}
        return SimpleNamespace(**{**optional, **modules, **unused, **tokenizers}, components=modules)

    weightless = type("Weightless", (adapter,), {"_load_pipeline": load_pipeline})
    return weightless(
        outline.configs, source=outline.source, resolution=outline.resolution, dtype=parts.dtype, device=META
    )

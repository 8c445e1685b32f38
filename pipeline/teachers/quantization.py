"""Weights in eight bits: what `--quantize` means, through torchao, which diffusers quantises with as well."""

from importlib.util import find_spec
from typing import Any

from torch.nn import Module

from pipeline.teachers.base import Quantization, TeacherError


def is_available() -> bool:
    """Whether weights can be quantised here."""
    return find_spec("torchao") is not None


def weight_config(kind: Quantization) -> Any:
    """torchao's configuration: weights of linear layers in 8 bits with a scale per output channel, computed as before.

    Raises TeacherError if torchao is not installed.
    """
    if not is_available():
        raise TeacherError(f"--quantize {kind} needs torchao; install dit-distill[pipeline], or torchao")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()


def pipeline_config(kind: Quantization) -> Any:
    """What `from_pretrained` of a diffusers pipeline is given to quantise its transformer while it is read.

    Raises TeacherError if torchao is not installed.
    """
    config = weight_config(kind)
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    return PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(config)})


def quantize(module: Module, kind: Quantization) -> None:
    """Quantise the linear layers of a module in place; raises TeacherError if torchao is not installed."""
    config = weight_config(kind)
    from torchao.quantization import quantize_

    quantize_(module, config)

"""LoRA on attention projections, or on MLPs too: made for Stage I, saved and loaded in diffusers' own layout."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError

from pipeline.teachers.base import ContextMode, TeacherError
from pipeline.teachers.lora_tensors import check_layers, read_lora_tensors
from pipeline.teachers.weights import LORA_NAME, lora_file
from pipeline.teachers.weights import LORA_RECORD_NAME as RECORD_NAME

# Image and text streams of joint attention, and the shared projections of FLUX.1's single blocks.
ATTENTION_PROJECTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)


def check_made_for(path: Path, transformer_digest: str, teacher: str, context: ContextMode) -> None:
    """Raise TeacherError if a LoRA is damaged, or if the record that Stage I left beside it does not fit this teacher.

    That is a record of another transformer, or of the same with another kind of context. A LoRA of FLUX.1-dev
    fits FLUX.1-Kontext by shape; applied by mistake it would spoil a cache without a sound.
    """
    file = lora_file(path)
    if file.suffix == ".safetensors":
        read_lora_tensors(file)
    record = file.parent / RECORD_NAME
    if not record.is_file():
        return
    try:
        made_for = json.loads(record.read_text(encoding="utf-8"))
        digest, name = made_for["transformer_digest"], made_for["teacher"]
        # Records from before there was a choice do not name it.
        refined_with = made_for.get("context", "joint")
    except (ValueError, KeyError, TypeError):
        raise TeacherError(f"{record}: not a record of dit-cache refine; remove it or refine again") from None
    if digest != transformer_digest:
        raise TeacherError(f"LoRA {path} was refined on {name}, not on {teacher}: refine again, or name that teacher")
    if refined_with != context:
        raise TeacherError(
            f"LoRA {path} was refined with --context {refined_with}, not {context}: use --context {refined_with}, "
            "or refine again"
        )


def refined_with(path: Path) -> dict[str, Any]:
    """Guidance, resolution and crop of Stage I, as its record beside a LoRA has them; nothing where there is none."""
    record = lora_file(path).parent / RECORD_NAME
    try:
        identity = json.loads(record.read_text(encoding="utf-8"))["identity"]
        said = {name: identity[name] for name in ("guidance", "resolution") if name in identity}
        return {**said, "crop": identity.get("crop", "box")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def attention_projections(transformer: Any) -> list[str]:
    """What the LoRA adapts: the attention projections of a family, as peft names them.

    FLUX.2's single blocks have theirs fused with the MLP's, into one linear layer before attention and one behind it;
    these are adapted whole, as there is no smaller module.
    """
    fused = [
        name
        for name, module in transformer.named_modules()
        if name.endswith((".attn.to_qkv_mlp_proj", ".attn.to_out")) and isinstance(module, torch.nn.Linear)
    ]
    return [*ATTENTION_PROJECTIONS, *fused]


def feed_forward_layers(transformer: Any) -> list[str]:
    """The linear layers of the blocks' MLPs, as peft names them; FLUX.2's single blocks have theirs fused (above)."""
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks." in name and _in_mlp(name.split(".")[2:])
    ]


def _in_mlp(path: list[str]) -> bool:
    return path[0] in ("ff", "ff_context", "proj_mlp", "proj_out")


def add_lora(
    transformer: Any, rank: int, seed: int, targets: Literal["attention", "attention+ff"] = "attention"
) -> list[torch.nn.Parameter]:
    """Attach a fresh LoRA (B = 0, so nothing changes yet) in float32 and return its trainable parameters."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        init_lora_weights="gaussian",
        target_modules=[
            *attention_projections(transformer),
            *(feed_forward_layers(transformer) if targets == "attention+ff" else []),
        ],
    )
    with _no_talk_of_merging():
        transformer.add_adapter(config)
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return trainable


def save_lora(pipeline_class: Any, transformer: Any, folder: Path) -> Path:
    """Write the LoRA in diffusers' layout, loadable by `load_lora_weights`. Returns the file."""
    metadata = _collate_lora_metadata({"transformer": transformer})
    for adapter in metadata.values():
        # peft keeps the names in a set, whose order is another one in every process: equal LoRAs would differ.
        adapter["target_modules"] = sorted(adapter["target_modules"])
    pipeline_class.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer), **metadata)
    return folder / LORA_NAME


def attach_lora(transformer: Any, path: Path) -> None:
    """Load a LoRA; in float32 it is merged into the weights, so that it costs nothing per step.

    In half precision and 8 bits it stays apart, because a small update may vanish when added to a rounded weight.
    Raises TeacherError for a LoRA of which anything would be left out.
    """
    file = lora_file(path)
    tensors = read_lora_tensors(file)
    check_layers(file, tensors, {name for name, _ in transformer.named_modules()})
    try:
        with _no_talk_of_merging():
            transformer.load_lora_adapter(str(file.parent), weight_name=file.name, prefix="transformer")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        # The first line of what PyTorch raises says only that something is wrong; the second names the tensor.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TeacherError(f"LoRA {file}: does not fit this teacher ({' '.join(lines[:2])})") from None
    adapted = sum(isinstance(module, BaseTunerLayer) for module in transformer.modules())
    if tensors.layers and adapted != len(tensors.layers):
        raise TeacherError(
            f"LoRA {file}: does not fit this teacher, which has {adapted} of the LoRA's {len(tensors.layers)} layers"
        )
    if transformer.dtype == torch.float32 and not getattr(transformer, "is_quantized", False):
        transformer.fuse_lora()
        transformer.unload_lora()
    transformer.requires_grad_(False)


@contextmanager
def _no_talk_of_merging() -> Iterator[None]:
    """Keep peft from warning, layer by layer, that it could not merge a LoRA into weights of 8 bits: none is merged."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear", category=UserWarning)
        yield

"""What the file of a LoRA holds: two halves for every layer that it adapts, and nothing that would be left out."""

import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.teachers.base import TeacherError

PREFIX = "transformer."
# A LoRA is B·A per layer. peft calls the halves lora_A and lora_B, older files down and up.
_HALF = re.compile(r"(?P<layer>.+)\.(?P<half>lora_[AB]|lora[._](?:down|up))\.(?:weight|bias)")
_MAGNITUDE = re.compile(r".+\.lora_magnitude_vector(\.weight)?")  # of DoRA, beside the halves
_PARTNER = {"lora_A": "lora_B", "lora.down": "lora.up", "lora_down": "lora_up"}
_PARTNER |= {second: first for first, second in _PARTNER.items()}


@dataclass(frozen=True)
class LoraTensors:
    """The layers of a LoRA, by their names in the transformer; peft: whether these are peft's names of them."""

    layers: frozenset[str]
    peft: bool


def read_lora_tensors(file: Path) -> LoraTensors:
    """Look through the tensors in a safetensors file.

    Raises TeacherError naming a tensor that is damaged or not finite, without its other half, or that would be left
    out.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            names = sorted(stored.keys())
            broken = [name for name in names if not _is_finite(stored.get_tensor(name))]
    except (SafetensorError, OSError) as error:
        raise TeacherError(
            f"LoRA {file} does not fit this teacher: it is damaged ({str(error).splitlines()[0]})"
        ) from None
    if not any(name.startswith(PREFIX) for name in names):
        raise TeacherError(f"LoRA {file}: holds no weights for the transformer")
    if foreign := [name for name in names if not name.startswith(PREFIX)]:
        raise _left_out(file, foreign, "are not the transformer's")
    if broken:
        raise TeacherError(
            f"LoRA {file}: {len(broken)} of its {len(names)} tensors are not finite floating-point numbers, such as "
            f"{broken[0]}; refine again, or copy the file again"
        )
    names = [name.removeprefix(PREFIX) for name in names]
    if any(".lokr_" in name for name in names):  # Kronecker products, which have halves of another kind
        return LoraTensors(frozenset(), False)
    halves = [match for name in names if (match := _HALF.fullmatch(name))]
    known = {match[0] for match in halves}
    if odd := [name for name in names if name not in known and not _MAGNITUDE.fullmatch(name)]:
        raise _left_out(file, odd, "are no halves of a LoRA")
    present = {(match["layer"], match["half"]) for match in halves}
    for layer, half in sorted(present):
        if (layer, _PARTNER[half]) not in present:
            raise TeacherError(
                f"LoRA {file}: {layer} has {half} but no {_PARTNER[half]}; the file is not whole: save or download it "
                "again"
            )
    return LoraTensors(frozenset(layer for layer, _ in present), all(h in ("lora_A", "lora_B") for _, h in present))


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def check_layers(file: Path, tensors: LoraTensors, layers: Container[str]) -> None:
    """Raise TeacherError unless the transformer, whose layers are given, has every layer that a LoRA adapts."""
    unknown = sorted(layer for layer in tensors.layers if layer not in layers) if tensors.peft else []
    if unknown:
        raise TeacherError(
            f"LoRA {file}: does not fit this teacher, which has no layer {unknown[0]} "
            f"({len(unknown)} of the LoRA's {len(tensors.layers)} layers); is it of another model?"
        )


def _left_out(file: Path, names: list[str], problem: str) -> TeacherError:
    return TeacherError(
        f"LoRA {file}: {len(names)} of its tensors {problem} and would be left out, such as {names[0]}; save a LoRA of "
        "the transformer alone, with lora_A and lora_B"
    )

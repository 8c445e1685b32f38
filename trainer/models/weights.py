"""Tensors in safetensors files: written whole or not at all, and read with a clear word about what is damaged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cache_schema.storage.files import write_file
from trainer.errors import TrainError


def save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors."""
    write_file(path, save({name: value.detach().cpu().contiguous() for name, value in state.items()}, {"format": "pt"}))


def load_weights(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read tensors by name; raises TrainError that names a file which is missing, not whole, or holds no numbers."""
    try:
        tensors = load_file(path, device=device)
    except FileNotFoundError:
        raise TrainError(f"{path} is missing") from None
    except OSError as error:  # a folder, a disk that fails, no permission
        raise TrainError(f"{path} cannot be read ({error}); copy or make it again") from None
    except SafetensorError as error:
        raise TrainError(f"{path} is damaged or not a safetensors file ({error}); copy or make it again") from None
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise TrainError(
            f"{path}: {len(broken)} of {len(tensors)} tensors are not finite, for example {broken[0]}; nothing can be "
            "computed with them, copy or train it again"
        )
    return tensors

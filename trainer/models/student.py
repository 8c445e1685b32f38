"""The student: an image network from timm, and all that is needed to embed an image with it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from cache_schema.storage.files import write_file
from trainer.config import StudentConfig
from trainer.errors import TrainError
from trainer.models.weights import load_weights, save_weights
from trainer.runs import read_json

FORMAT = "dit-distill/student"


class Student(nn.Module):
    """E_R = network(I): pixels to one embedding; the normalisation of the pixels is part of it."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, kwargs: dict[str, Any], network: nn.Module, normalisation: dict[str, Any]):
        super().__init__()
        self.name, self.kwargs, self.network = name, kwargs, network
        self.input_size = int(normalisation["size"])  # pixels, square
        self.dim = int(getattr(network, "num_features"))  # noqa: B009
        for key in ("mean", "std"):
            values = torch.tensor(normalisation[key], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(key, values, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed uint8 images (B, 3, S, S) with values 0..255: returns E_R (B, C), not normalised."""
        pixels = images.to(torch.float32).div(255.0)  # (B, 3, S, S)
        return self.network((pixels - self.mean) / self.std)  # (B, C)

    embed = forward

    def description(self) -> dict[str, Any]:
        """What `student.json` holds: enough to rebuild the network and feed it."""
        return {
            "format": FORMAT,
            "version": 1,
            "name": self.name,
            "kwargs": self.kwargs,
            "input": {"size": self.input_size, "mean": self.mean.flatten().tolist(),
                      "std": self.std.flatten().tolist(), "interpolation": "bicubic"},
            "embedding": {"channels": self.dim, "metric": "cosine"},
        }  # fmt: skip


def build_student(config: StudentConfig) -> Student:
    """Build the student by its timm name, with random, timm's pretrained, or the file's weights.

    Raises TrainError for an unknown name, a bad argument, missing or unfitting weights.
    """
    source: dict[str, Any] = {"pretrained": config.pretrained}
    if config.weights is not None:
        _check_weights_file(Path(config.weights), config)
        source = {"pretrained": True, "pretrained_cfg_overlay": {"file": config.weights}}
    try:
        network = timm.create_model(
            config.name,
            num_classes=0,
            **source,
            **config.timm_kwargs(),
        )
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        weights = f" with weights {config.weights}" if config.weights else ""
        raise TrainError(f"cannot build student {config.name}{weights}: {reason}") from error
    return _wrap(config.name, config.timm_kwargs(), network)


def save_student(student: Student, folder: Path) -> None:
    """Write `student.safetensors` (timm's parameter names) and `student.json` into `folder`."""
    save_weights(student.network.state_dict(), folder / "student.safetensors")
    write_file(folder / "student.json", (json.dumps(student.description(), indent=2) + "\n").encode())


def load_student(path: Path) -> Student:
    """Load a student from a run directory or from its `student.safetensors` (student.json beside it).

    Raises TrainError when either file is missing or the two do not fit.
    """
    weights = path / "student.safetensors" if path.is_dir() else path
    description = weights.with_name("student.json")
    for file in (weights, description):
        if not file.is_file():
            raise TrainError(f"{file} is missing: a trained student is student.safetensors with student.json")
    about = read_json(description)
    if about.get("format") != FORMAT or about.get("version") != 1:
        raise TrainError(f"{description} does not describe a student of this version")
    student = _wrap(about["name"], about["kwargs"],
                    timm.create_model(about["name"], pretrained=False, num_classes=0, **about["kwargs"]),
                    about["input"])  # fmt: skip
    tensors = load_weights(weights)
    try:
        student.network.load_state_dict(tensors)
    except RuntimeError as error:
        raise TrainError(f"{weights} does not fit {description}: {str(error).splitlines()[0]}") from error
    return student


def _wrap(
    name: str, kwargs: dict[str, Any], network: nn.Module, normalisation: dict[str, Any] | None = None
) -> Student:
    if normalisation is None:
        data = resolve_model_data_config(network)
        normalisation = {
            "size": kwargs.get("img_size", data["input_size"][-1]),
            "mean": data["mean"],
            "std": data["std"],
        }
    return Student(name, kwargs, network, normalisation)


def _check_weights_file(file: Path, config: StudentConfig) -> None:
    """timm loads what fits and skips the rest: refuse a file that would leave parts at random, or be cut."""
    if not file.is_file():
        raise TrainError(f"student weights {file}: no such file")
    try:
        with safe_open(file, framework="pt") as weights:
            have = set(weights.keys())
            broken = [name for name in sorted(have) if not weights.get_tensor(name).isfinite().all()]
    except SafetensorError as error:
        raise TrainError(f"student weights {file} is not a safetensors file ({error})") from None
    if broken:
        raise TrainError(f"student weights {file}: {len(broken)} tensors are not finite, for example {broken[0]}")
    with torch.device("meta"):
        network = timm.create_model(config.name, num_classes=0, **config.timm_kwargs())
    need = network.state_dict().keys()
    missing, unused = sorted(need - have), sorted(have - need - _classifier(network, have))
    if missing:
        raise TrainError(
            f"student weights {file} lack {len(missing)} of the {len(need)} tensors of {config.name}, "
            f"for example {missing[0]}"
        )
    if unused:
        raise TrainError(
            f"student weights {file} hold {len(unused)} tensors that {config.name} as configured has not, for example "
            f"{unused[0]}: they would be cut away; give the student the size of the file (student.depth and others)"
        )


def _classifier(network: nn.Module, names: set[str]) -> set[str]:
    """The tensors of the classifier that a published file has and an embedding has not."""
    layers = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    return {name for name in names if name.startswith(tuple(f"{layer}." for layer in layers))}

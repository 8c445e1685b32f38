"""The student: an image network from timm, and all that is needed to embed an image with it alone."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cache_schema.storage.files import write_file
from trainer.config import StudentConfig
from trainer.data.images import Fit
from trainer.errors import TrainError
from trainer.models.weights import load_weights, save_weights
from trainer.runs import read_json

FORMAT = "dit-distill/student"
BUILD_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, OSError)
# timm's arguments that the trainer itself gives, or that would change what a student is.
OURS = {
    "num_classes", "in_chans", "features_only", "out_indices", "pretrained", "pretrained_cfg",
    "pretrained_cfg_overlay", "checkpoint_path",
}  # fmt: skip


class Student(nn.Module):
    """E_R = network(I): pixels to one embedding; the normalisation of the pixels is part of it."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, kwargs: dict[str, Any], network: nn.Module, normalisation: dict[str, Any], dim: int):
        """`normalisation` is the network's input: "size" in pixels, "mean" and "std"; `dim` the width C of E_R."""
        super().__init__()
        self.name, self.kwargs, self.network = name, kwargs, network
        self.input_size = int(normalisation["size"])  # pixels, square
        self.dim = dim
        self.fit: Fit = normalisation.get("fit", "squash")  # how an image is made square
        self._frozen: list[nn.Module] = []
        for key in ("mean", "std"):
            values = torch.tensor(normalisation[key], dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(key, values, persistent=False)

    def freeze_batch_norm(self, scales_too: bool) -> None:
        """Keep the statistics of batch norms as they are from now on, and with `scales_too` all of them."""
        self._frozen = [module for module in self.network.modules() if isinstance(module, _BatchNorm)]
        for module in self._frozen if scales_too else ():
            module.requires_grad_(False)

    def compile_network(self, **options: Any) -> None:
        """Compile what `forward` and `with_tokens` call of the network, with options of `torch.compile`."""
        network: Any = self.network
        network.compile(**options)
        if hasattr(network, "forward_features"):  # which `with_tokens` uses without a call of the network
            network.forward_features = torch.compile(network.forward_features, **options)

    @property
    def keeps_statistics(self) -> bool:
        """Whether batch norms use the statistics they came with in training too."""
        return bool(self._frozen)

    def train(self, mode: bool = True) -> Student:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Embed uint8 images (B, 3, S, S) with values 0..255: returns E_R (B, C), not normalised."""
        return self.network(self.normalise(images))  # (B, C)

    embed = forward

    def with_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """E_R (B, C), and what the network knows of each place of the image: (B, h, w, C_s), before it is pooled.

        Raises TrainError for a network that keeps no map of the image.
        """
        network: Any = self.network
        features = network.forward_features(self.normalise(images))
        return network.forward_head(features), self._map(features)

    @property
    def token_shape(self) -> tuple[int, int, int]:
        """(h, w, C_s) of `with_tokens`; raises TrainError for a network that keeps no map of the image."""
        with torch.device("meta"):
            twin: Any = _create(self.name, self.kwargs).eval()
            if not hasattr(twin, "forward_features") or not hasattr(twin, "forward_head"):
                raise TrainError(f"student {self.name} has no features before it pools them; set regression.weight=0")
            features = twin.forward_features(torch.empty(2, 3, self.input_size, self.input_size))
        _, *shape = self._map(features).shape
        return shape[0], shape[1], shape[2]

    def _map(self, features: Tensor) -> Tensor:
        """What `forward_features` gives as (B, h, w, C_s): tokens lie in rows, maps have channels first or last."""
        network: Any = self.network
        if not isinstance(features, Tensor):
            raise TrainError(
                f"student {self.name} keeps no map of the image before it pools, but a {type(features).__name__}; "
                "set regression.weight=0, or choose another network"
            )
        if features.dim() == 4:
            return (
                features if network.num_features == features.shape[3] != features.shape[1] else features.movedim(1, 3)
            )
        if features.dim() == 3:
            tokens = features[:, getattr(network, "num_prefix_tokens", 0) :]  # (B, h·w, C_s)
            side = math.isqrt(tokens.shape[1])
            if side * side == tokens.shape[1] and side > 1:
                return tokens.unflatten(1, (side, side))
        raise TrainError(
            f"student {self.name} keeps no map of the image before it pools: {tuple(features.shape[1:])}; "
            "set regression.weight=0, or choose another network"
        )

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) with values 0..255 -> float32, as the network wants its pixels."""
        return (images.to(torch.float32).div(255.0) - self.mean) / self.std

    def description(self) -> dict[str, Any]:
        """What `student.json` holds: enough to rebuild the network and feed it."""
        return {
            "format": FORMAT,
            "version": 1,
            "name": self.name,
            "kwargs": self.kwargs,
            "input": {"size": self.input_size, "mean": self.mean.flatten().tolist(),
                      "std": self.std.flatten().tolist(), "interpolation": "bicubic", "fit": self.fit},
            "embedding": {"channels": self.dim, "metric": "cosine"},
        }  # fmt: skip


def build_student(config: StudentConfig) -> Student:
    """Build the student by its timm name, with random, timm's pretrained, or the file's weights.

    Raises TrainError for an unknown name, a bad argument, missing or unfitting weights.
    """
    taken = sorted(OURS & config.extra.keys())
    if taken:
        raise TrainError(
            f"student.extra: {taken[0]} is not free to choose; a student turns RGB images into one embedding"
        )
    source: dict[str, Any] = {"pretrained": config.pretrained}
    if config.weights is not None:
        _check_weights_file(Path(config.weights), config)
        source = {"pretrained": True, "pretrained_cfg_overlay": {"file": config.weights}}
    try:
        network = _create(config.name, config.timm_kwargs(), **source)
    except BUILD_ERRORS as error:
        reason = _first_line(error)
        weights = f" with weights {config.weights}" if config.weights else ""
        unreachable = isinstance(error, OSError) and config.pretrained and not config.weights
        advice = "; --student-weights FILE.safetensors needs no hub, student.pretrained=false no weights"
        raise TrainError(
            f"cannot build student {config.name}{weights}: {reason}{advice if unreachable else ''}"
        ) from error
    student = _wrap(config.name, config.timm_kwargs(), network)
    _refuse_unseen_edges(student)
    _set_batch_norm(student, config)
    return student


@functools.cache
def has_batch_norm(name: str) -> bool:
    """Whether timm's network of a name norms over the batch, as most convolutional ones do; False if unknown."""
    try:
        with torch.device("meta"):
            network = _create(name, {})
    except BUILD_ERRORS:
        return False  # said when it is built
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def _refuse_unseen_edges(student: Student) -> None:
    """Raise TrainError where patches do not cover the image: timm leaves pixels on the right and below unread."""
    embed = getattr(student.network, "patch_embed", None)
    project = getattr(embed, "proj", None)
    if not isinstance(project, nn.Conv2d) or getattr(embed, "dynamic_img_pad", False):
        return
    side, size = project.stride[0], student.input_size
    if project.kernel_size == project.stride and size % side:
        raise TrainError(
            f"student {student.name} reads patches of {side} pixels, and the last {size % side} of {size} would never "
            f"be seen; use --image-size {size - size % side} or {size - size % side + side}"
        )


def _set_batch_norm(student: Student, config: StudentConfig) -> None:
    """Do as the config says; raises TrainError where statistics are to be kept that were never measured."""
    if config.batch_norm_momentum is not None:
        for module in student.network.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = config.batch_norm_momentum
    if config.batch_norm == "train":
        return
    if not config.starts_trained:
        raise TrainError(
            f"student.batch_norm={config.batch_norm} keeps the statistics of pretrained weights; add --pretrained or "
            "--student-weights FILE, or set student.batch_norm=train"
        )
    student.freeze_batch_norm(scales_too=config.batch_norm == "freeze")


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
    try:
        named = about["name"], about["kwargs"], about["input"]
    except KeyError as error:
        raise TrainError(f"{description} does not describe a student: it lacks {error}") from None
    return rebuild_student(*named, weights, description)


def rebuild_student(name: str, kwargs: dict[str, Any], input_: dict[str, Any], weights: Path, about: Path) -> Student:
    """A student with the weights of a file; `input_` is as in `student.json`, `about` the file that says all this.

    Raises TrainError when it cannot be built, or the weights are missing, damaged or do not fit.
    """
    if not isinstance(name, str):
        raise TrainError(f"{about} does not describe a student that can be built: its name is {json.dumps(name)}")
    try:
        student = _wrap(name, kwargs, _create(name, kwargs), input_)
    except (KeyError, *BUILD_ERRORS) as error:
        raise TrainError(f"{about} does not describe a student that can be built: {_first_line(error)}") from error
    tensors = load_weights(weights)
    try:
        student.network.load_state_dict(tensors)
    except RuntimeError as error:
        raise TrainError(f"{weights} does not fit {about}: {str(error).splitlines()[0]}") from error
    return student


def _create(name: str, kwargs: dict[str, Any], **source: Any) -> nn.Module:
    return create_network(name, kwargs, **source)[0]


def create_network(name: str, kwargs: dict[str, Any], **source: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A timm network and the arguments it took; one that takes images of any size, as convolutional ones do, is not
    told `img_size`."""
    try:
        return timm.create_model(name, num_classes=0, **source, **kwargs), kwargs
    except TypeError as error:
        if "img_size" not in kwargs or "'img_size'" not in str(error):
            raise
    taken = {key: value for key, value in kwargs.items() if key != "img_size"}
    return timm.create_model(name, num_classes=0, **source, **taken), taken


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
    dim = embedding_width(name, kwargs, int(normalisation["size"]))
    return Student(name, kwargs, network, normalisation, dim)


def embedding_width(name: str, kwargs: dict[str, Any], size: int) -> int:
    """The width C of what a timm network makes of images of `size` pixels: measured, for timm's own figure is
    that of the last stage in some families. Computes shapes alone, on torch's meta device.

    Raises TrainError where the network does not take such images, or gives another thing than (B, C).
    """
    try:
        with torch.device("meta"):
            twin = _create(name, kwargs).eval()
            output = twin(torch.empty(2, 3, size, size))
    except BUILD_ERRORS as error:
        raise TrainError(f"student {name} does not take images of {size} pixels: {_first_line(error)}") from error
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise TrainError(
            f"student {name} gives {shape} for two images, not an embedding (2, C); choose another network"
        )
    return int(shape[1])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


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
    try:
        with torch.device("meta"):
            network = _create(config.name, config.timm_kwargs())
    except BUILD_ERRORS as error:
        raise TrainError(f"cannot build student {config.name}: {_first_line(error)}") from error
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

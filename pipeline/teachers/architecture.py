"""What a teacher's configuration alone says: token counts and channels, without a single weight."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.teachers.base import TapShape, TeacherError

_INDEX = "model_index.json"
_CONFIGS = ("transformer/config.json", "vae/config.json")


class Architecture(Protocol):
    """The shapes of a teacher of one family. source: its name in messages."""

    family: str

    def tap_shape(self, tap: str, resolution: int, source: str) -> TapShape:
        """Shape of a tap at a resolution in pixels; raises TeacherError for an unknown tap or a resolution that does
        not fit."""
        ...


@dataclass(frozen=True)
class FluxArchitecture:
    """FLUX.1. in_channels, out_channels: of packed latents (2×2 patches); vae_factor: pixels per latent, per side."""

    in_channels: int
    out_channels: int
    hidden_channels: int
    double_blocks: int
    single_blocks: int
    vae_factor: int

    family = "flux"

    @classmethod
    def from_configs(cls, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> "FluxArchitecture":
        """Read it from the configurations of FluxTransformer2DModel and AutoencoderKL. Raises KeyError, TypeError."""
        return cls(
            in_channels=int(transformer["in_channels"]),
            out_channels=int(transformer.get("out_channels") or transformer["in_channels"]),
            hidden_channels=int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"]),
            double_blocks=int(transformer["num_layers"]),
            single_blocks=int(transformer["num_single_layers"]),
            vae_factor=2 ** (len(vae["block_out_channels"]) - 1),
        )

    def grid(self, resolution: int, source: str) -> tuple[int, int]:
        """Rows and columns of object tokens: each covers 2 × 2 latents."""
        unit = 2 * self.vae_factor
        if resolution < unit or resolution % unit:
            raise TeacherError(f"resolution {resolution} must be a multiple of {unit} for the teacher {source}")
        return resolution // unit, resolution // unit

    def tap_shape(self, tap: str, resolution: int, source: str) -> TapShape:
        grid = self.grid(resolution, source)
        if tap != "velocity":
            self.block(tap, source)
        channels = self.out_channels if tap == "velocity" else self.hidden_channels
        return TapShape(tap, grid[0] * grid[1], channels, grid)

    def block(self, tap: str, source: str) -> int:
        """Depth of the block whose output a tap reads, counted from the input; raises TeacherError, naming the taps."""
        if tap == "hidden":
            return self.double_blocks + self.single_blocks - 1
        match = re.fullmatch(r"(double|single)\.(\d+)", tap)
        if match:
            count, before = (
                (self.double_blocks, 0) if match[1] == "double" else (self.single_blocks, self.double_blocks)
            )
            if int(match[2]) < count:
                return before + int(match[2])
        raise TeacherError(
            f"the teacher {source} has no tap {tap!r}; it has velocity, hidden, "
            f"double.0–double.{self.double_blocks - 1} and single.0–single.{self.single_blocks - 1}"
        )


# FLUX.1 [dev] and FLUX.1 Kontext [dev] as published: 12 B parameters, 24 heads of 128, VAE with 16 channels.
FLUX_1 = FluxArchitecture(
    in_channels=64, out_channels=64, hidden_channels=24 * 128, double_blocks=19, single_blocks=38, vae_factor=8
)

# Transformer class named in model_index.json → how its configurations are read.
_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Architecture]] = {
    "FluxTransformer2DModel": FluxArchitecture.from_configs,
}


def read_architecture(spec: str, revision: str | None = None) -> Architecture:
    """Read the shapes of a diffusers folder or hub repository from three small JSON files.

    Raises TeacherError if they are not there, cannot be fetched, or are of no known family.
    """
    index = _read_json(spec, _INDEX, revision)
    try:
        transformer_class = str(index["transformer"][1])
    except (KeyError, IndexError, TypeError):
        raise TeacherError(
            f"teacher {spec}: {_INDEX} names no transformer; it is not a diffusion transformer"
        ) from None
    if transformer_class not in _READERS:
        known = ", ".join(sorted(_READERS))
        raise TeacherError(f"teacher {spec}: no adapter for {transformer_class}; known are {known}")
    try:
        return _READERS[transformer_class](*(_read_json(spec, name, revision) for name in _CONFIGS))
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(
            f"teacher {spec}: {' or '.join(_CONFIGS)} has no usable {error}; save the pipeline with diffusers again"
        ) from None


def _read_json(spec: str, name: str, revision: str | None) -> dict[str, Any]:
    path = _local_file(spec, name, revision)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TeacherError(f"teacher {spec}: {path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise TeacherError(f"teacher {spec}: {path} is not a JSON object")
    return content


def _local_file(spec: str, name: str, revision: str | None) -> Path:
    folder = Path(spec)
    if folder.exists():
        if not (folder / name).is_file():
            raise TeacherError(f"teacher {spec}: no {name} there; it must be a folder saved by diffusers")
        return folder / name
    if spec.count("/") != 1 or spec.startswith((".", "/")):
        raise TeacherError(f"teacher {spec}: no such folder, and not the name of a hub repository (owner/name)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(spec, name, revision=revision))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TeacherError(
            f"teacher {spec}: {name} is not in the local hub cache and could not be downloaded ({reason}); "
            "give --teacher the path of a diffusers folder, or flux-dev or flux-kontext for the published numbers"
        ) from None

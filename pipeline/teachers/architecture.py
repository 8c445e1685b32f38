"""What a teacher's configuration alone says: token counts and channels, without a single weight."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.teachers.base import TapShape, TeacherError

INDEX_NAME = "model_index.json"
_CONFIGS = ("transformer/config.json", "vae/config.json")

# What diffusers' pipelines cut captions to by default; SD3 puts the tokens of its CLIP encoders in front.
MAX_TEXT_TOKENS = {"flux": 512, "flux2": 512, "sd3": 256}
_CLIP_TOKENS = 77


# Behind the name of a block: what its attention reads, in place of what it returns.
MODULATED = ".modulated"


@dataclass(frozen=True)
class Place:
    """Where a tap is read. depth: of its block, counted from the input. modulated: what the block's attention reads.

    That is the block's input after the layer norm, scale and shift of AdaLN, which bring a few massive channels nearer
    to the others (DiTF, arXiv 2505.18584); otherwise it is the raw residual stream behind the block.
    """

    depth: int
    modulated: bool = False


@dataclass(frozen=True)
class Architecture:
    """The shapes of one diffusion transformer and its VAE.

    latent_channels: of packed latents (2×2 patches). blocks: (kind, count), in the order in which they run; a tap
    `kind.N` reads the N-th of its kind, `kind.N.modulated` what its attention reads. vae_factor: pixels per latent, per
    side. max_columns: where the positional table ends, for families that put two views side by side. guidance_embeds:
    whether guidance is one of its inputs. text_values: numbers in the embedding of a caption, at most: a tokenizer with
    a shorter limit gives fewer.
    """

    family: str
    latent_channels: int
    hidden_channels: int
    blocks: tuple[tuple[str, int], ...]
    vae_factor: int = 8
    max_columns: int | None = None
    guidance_embeds: bool = False
    text_values: int = 0

    def grid(self, resolution: int, source: str) -> tuple[int, int]:
        """Rows and columns of object tokens, each 2 × 2 latents; raises TeacherError if the resolution does not fit.

        source: the teacher's name in messages, here and below.
        """
        unit = 2 * self.vae_factor
        if resolution < unit or resolution % unit:
            raise TeacherError(f"resolution {resolution} must be a multiple of {unit} for the teacher {source}")
        side = resolution // unit
        if self.max_columns is not None and 2 * side > self.max_columns:
            raise TeacherError(
                f"resolution {resolution}: two views side by side are {2 * side} tokens wide, and the positional table "
                f"of the teacher {source} ends at {self.max_columns}; use at most "
                f"--resolution {self.max_columns // 2 * unit}"
            )
        return side, side

    def latent_values(self, resolution: int, source: str) -> int:
        """Numbers in the latents of one view; raises TeacherError for a resolution that does not fit."""
        rows, columns = self.grid(resolution, source)
        return rows * columns * self.latent_channels

    def taps(self) -> list[str]:
        """A tap for every block's output, as `kind.N`."""
        return [f"{kind}.{n}" for kind, count in self.blocks for n in range(count)]

    def all_taps(self, modulated: bool = False) -> list[str]:
        """Every tap there is, each place once, in the order in which they are read; the modulated ones if wanted."""
        outputs = self.taps()
        names = [*outputs[:-1], "hidden"]  # hidden is the last block's output
        if modulated:
            names = [name for block, name in zip(outputs, names, strict=True) for name in (block + MODULATED, name)]
        return [*names, "velocity"]

    def tap_shape(self, tap: str, resolution: int, source: str) -> TapShape:
        """Shape of a tap at a resolution in pixels; raises TeacherError for an unknown tap or such a resolution."""
        grid = self.grid(resolution, source)
        if tap != "velocity":
            self.place(tap, source)
        channels = self.latent_channels if tap == "velocity" else self.hidden_channels
        return TapShape(tap, grid[0] * grid[1], channels, grid)

    def block(self, tap: str, source: str) -> int:
        """Depth of the block that a tap is read at, counted from the input; raises TeacherError, naming the taps."""
        return self.place(tap, source).depth

    def place(self, tap: str, source: str) -> Place:
        """Where a tap is read, for all but `velocity`, the output; raises TeacherError, naming the taps."""
        taps = self.taps()
        if tap == "hidden":
            return Place(len(taps) - 1)
        block = tap.removesuffix(MODULATED)
        if block in taps:
            return Place(taps.index(block), modulated=block != tap)
        known = ["velocity", "hidden", *(f"{kind}.0–{kind}.{count - 1}" for kind, count in self.blocks if count)]
        raise TeacherError(
            f"the teacher {source} has no tap {tap!r}; it has {', '.join(known[:-1])} and {known[-1]}, and of each "
            f"block also what its attention reads, as {taps[0]}{MODULATED}"
        )

    def blocks_run(self, taps: Sequence[str], source: str) -> int:
        """How many blocks a pass runs that ends where the deepest tap was read; raises TeacherError as `place`."""
        count = sum(number for _, number in self.blocks)
        places = [self.place(tap, source) for tap in taps if tap != "velocity"]
        return count if len(places) < len(taps) else max(place.depth + (not place.modulated) for place in places)

    def middle(self) -> str:
        """The tap in the middle of the blocks, as DiTF found it best for FLUX: what the attention there reads."""
        taps = self.taps()
        return taps[len(taps) // 2] + MODULATED


# How a family's architecture follows from the configurations of its transformer and its VAE.
ArchitectureReader = Callable[[Mapping[str, Any], Mapping[str, Any]], Architecture]


def flux_architecture(transformer: Mapping[str, Any], vae: Mapping[str, Any], family: str = "flux") -> Architecture:
    """Of FluxTransformer2DModel and AutoencoderKL. Raises KeyError, TypeError or ValueError if a number is missing."""
    return Architecture(
        family=family,
        latent_channels=int(transformer.get("out_channels") or transformer["in_channels"]),
        hidden_channels=int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"]),
        blocks=(("double", int(transformer["num_layers"])), ("single", int(transformer["num_single_layers"]))),
        vae_factor=_vae_factor(vae),
        # FLUX.2 klein's pipeline never passes one, whatever the configuration says.
        guidance_embeds=family == "flux" and bool(transformer.get("guidance_embeds")),
        text_values=MAX_TEXT_TOKENS[family] * int(transformer["joint_attention_dim"])
        + int(transformer.get("pooled_projection_dim") or 0),
    )


def flux2_architecture(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Architecture:
    """Of Flux2Transformer2DModel and AutoencoderKLFlux2, whose configurations use the same words."""
    return flux_architecture(transformer, vae, family="flux2")


def sd3_architecture(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Architecture:
    """Of SD3Transformer2DModel, which cuts its 2×2 patches itself, and AutoencoderKL."""
    return Architecture(
        family="sd3",
        latent_channels=4 * int(transformer.get("out_channels") or transformer["in_channels"]),
        hidden_channels=int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"]),
        blocks=(("block", int(transformer["num_layers"])),),
        vae_factor=_vae_factor(vae),
        max_columns=transformer.get("pos_embed_max_size"),
        text_values=(_CLIP_TOKENS + MAX_TEXT_TOKENS["sd3"]) * int(transformer["joint_attention_dim"])
        + int(transformer["pooled_projection_dim"]),
    )


def _vae_factor(vae: Mapping[str, Any]) -> int:
    return 2 ** (len(vae["block_out_channels"]) - 1)


def read_classes(spec: str, revision: str | None = None) -> tuple[str, str]:
    """Pipeline and transformer class that model_index.json of a diffusers folder or hub repository names.

    Raises TeacherError if it is not there, cannot be fetched, or names no transformer.
    """
    index = read_config(spec, INDEX_NAME, revision)
    try:
        return str(index["_class_name"]), str(index["transformer"][1])
    except (KeyError, IndexError, TypeError):
        raise TeacherError(
            f"teacher {spec}: {INDEX_NAME} names no transformer; it is not a diffusion transformer"
        ) from None


def says_step_distilled(spec: str, revision: str | None = None) -> bool:
    """Whether a folder or hub repository says of itself, as FLUX.2 klein does, that it is distilled to a few steps.

    Raises TeacherError as `read_config`.
    """
    return bool(read_config(spec, INDEX_NAME, revision).get("is_distilled"))


def read_architecture(spec: str, revision: str | None, read: ArchitectureReader) -> Architecture:
    """Read the shapes of a diffusers folder or hub repository from two small JSON files.

    Raises TeacherError if they are not there, cannot be fetched, or lack a number.
    """
    try:
        return read(*(read_config(spec, name, revision) for name in _CONFIGS))
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(
            f"teacher {spec}: {' or '.join(_CONFIGS)} has no usable {error}; save the pipeline with diffusers again"
        ) from None


def read_config(spec: str, name: str, revision: str | None) -> dict[str, Any]:
    """Read a small JSON file of a diffusers folder or hub repository; name: its path there.

    Raises TeacherError if it is not there, cannot be fetched, or is no JSON object.
    """
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
            "give --teacher the path of a diffusers folder, or a preset, whose published numbers are known"
        ) from None

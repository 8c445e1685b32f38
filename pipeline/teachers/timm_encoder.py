"""Image encoders as teachers: any timm network, `--teacher timm:NAME[:weights.safetensors]`.

One forward pass per image and view, without noise, text or context. Taps: `tokens`, what the network's last layer
makes of each place, and `tokens.N`, the same after its N-th stage (of a ViT: block).
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.teachers.base import EncoderInput, TapShape, TeacherError
from pipeline.teachers.encoder import Encoder, EncoderArchitecture, encoder_architecture
from pipeline.teachers.passes import memory_errors
from pipeline.teachers.timm_networks import load_network, no_file, own_resolution, parse_spec, size_refused, takes_size

_NO_ROOM = "its weights do not fit: use --dtype bfloat16, a smaller network or a larger device (it does not offload)"


class TimmEncoder(Encoder):
    """A frozen timm network that reads images. Fulfils `base.ImageEncoder`."""

    family = "timm"
    pipeline_class = "timm"
    revision: str | None = None

    def __init__(
        self,
        spec: str,
        *,
        resolution: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        input: EncoderInput = "object",
    ) -> None:
        """`resolution`: side of the square views in pixels, None the network's own.

        Raises TeacherError for what cannot be loaded.
        """
        parsed = parse_spec(spec)
        assert parsed is not None, "only teachers called timm:…"
        self.source, self.input = spec, input
        self.resolution = resolution = resolution or own_resolution(parsed.name, spec)
        self.dtype, self.device = dtype, torch.device(device)
        # Here and not by the first pass, which no smaller one could mend.
        with memory_errors(f"while loading teacher {spec}", _NO_ROOM):
            network = load_network(parsed, resolution, spec)
            self._digest = _digest(parsed.name, network)
            mean, std = (torch.tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
            self._mean, self._std = mean.to(self.device), std.to(self.device)
            self._network = network.eval().requires_grad_(False).to(self.device, dtype)
        self.architecture = encoder_architecture(self.family, _measure(self._network, self.resolution, spec))

    def digests(self) -> dict[str, str]:
        """Component name → SHA-256 of its weights, under timm's names, and of what it is."""
        return {"encoder": self._digest}

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
        if features.dim() == 3:
            return features[:, _prefix_tokens(self._network) :]
        return _tokens(_channels_first(self._network, features))


def outline_architecture(teacher: str, resolution: int | None) -> tuple[EncoderArchitecture, int]:
    """The taps of `timm:NAME` at a resolution, and that resolution; no weights are read. Raises TeacherError."""
    spec = parse_spec(teacher)
    assert spec is not None, "only teachers called timm:…"
    if spec.weights is not None and not spec.weights.exists():
        raise no_file(spec, teacher)
    import timm

    side = resolution or own_resolution(spec.name, teacher)
    sized: dict[str, Any] = {"img_size": side} if takes_size(spec.name, side, teacher) else {}
    with torch.device("meta"):
        network = timm.create_model(spec.name, pretrained=False, num_classes=0, **sized).eval()
    return encoder_architecture(TimmEncoder.family, _measure(network, side, teacher)), side


def _measure(network: Any, resolution: int, teacher: str) -> list[TapShape]:
    """The shape of every tap, from the input to the output, by one pass of a black image."""
    weight = next(network.parameters())
    black = torch.zeros(1, 3, resolution, resolution, device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            final = network.forward_features(black)
            maps = _stages(network, black)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise size_refused(teacher, resolution, error) from None
    shapes = [
        TapShape(f"tokens.{n}", m.shape[2] * m.shape[3], m.shape[1], (m.shape[2], m.shape[3]))
        for n, m in enumerate(maps)
    ]
    grid, channels = _grid(network, final, teacher)
    return [*shapes, TapShape("tokens", grid[0] * grid[1], channels, grid)]


def _grid(network: Any, final: Tensor, teacher: str) -> tuple[tuple[int, int], int]:
    """Rows and columns of the output's tokens, and their channels; raises TeacherError where it is no grid."""
    if not isinstance(final, Tensor):
        raise TeacherError(f"teacher {teacher}: its output is a {type(final).__name__}, not a grid of tokens")
    if final.dim() == 4:
        _, channels, rows, columns = _channels_first(network, final).shape
        return (rows, columns), channels
    tokens = final.shape[1] - _prefix_tokens(network) if final.dim() == 3 else 0
    side = round(tokens**0.5)
    if not tokens or side * side != tokens:
        raise TeacherError(f"teacher {teacher}: its output {tuple(final.shape)} is not a grid of tokens")
    return (side, side), final.shape[2]


def _prefix_tokens(network: Any) -> int:
    """How many class and register tokens stand before those of places."""
    return int(getattr(network, "num_prefix_tokens", 0))


def _channels_first(network: Any, features: Tensor) -> Tensor:
    """A map of places as (B, C, h, w); some families put the channels last."""
    last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
    return features.permute(0, 3, 1, 2) if last else features


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

"""FLUX.1 (dev, Kontext, and any diffusers folder of that family) as a teacher."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from torch import Tensor

from pipeline.teachers.base import TapShape, TeacherError, TextEmbedding
from pipeline.teachers.lora import attach_lora, check_made_for, save_lora
from pipeline.teachers.weights import component_digest
from pipeline.views import from_signed, to_signed

# diffusers' own default for FLUX; a tokenizer with a shorter limit has the last word.
_MAX_TEXT_TOKENS = 512


def pack_latents(latents: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H/2·W/2, 4C): FLUX turns each 2×2 patch into one token."""
    B, C, H, W = latents.shape
    patches = latents.reshape(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5)  # B, h, w, C, 2, 2
    return patches.reshape(B, (H // 2) * (W // 2), 4 * C)


def unpack_latents(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse: (B, rows·columns, 4C) → (B, C, 2·rows, 2·columns)."""
    B, _, C4 = tokens.shape
    patches = tokens.reshape(B, rows, columns, C4 // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(B, C4 // 4, 2 * rows, 2 * columns)


def image_ids(rows: int, columns: int, stream: int = 0) -> Tensor:
    """Rotary position ids (rows·columns, 3). Axis 0 tells streams apart: 0 the noisy object, 1 the clean context."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = stream
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(rows * columns, 3)


class _TapsCaptured(Exception):  # noqa: N818 - control flow, not an error
    """Leaves the transformer's forward as soon as the deepest tap was read."""


class FluxTeacher:
    """A diffusers folder of the FLUX.1 family behind the `Teacher` protocol.

    folder: a diffusers folder on disk. resolution: side of both views in pixels. guidance: used only where the
    configuration has guidance embeddings. lora: a LoRA in diffusers' layout, the result of Stage I.
    Raises TeacherError if the folder is not of this family or the resolution does not fit its VAE.
    """

    family = "flux"
    pipeline_class = "FluxKontextPipeline"

    def __init__(
        self,
        folder: Path,
        *,
        resolution: int,
        source: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        guidance: float = 3.5,
        lora: Path | None = None,
    ):
        self.folder, self.source, self.revision = Path(folder), source or str(folder), revision
        self.resolution, self.dtype, self.device = resolution, dtype, torch.device(device)
        self._digests: dict[str, str] = {}  # reading 24 GB takes a minute: once is enough
        self.pipe = FluxKontextPipeline.from_pretrained(folder, dtype=dtype).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer.eval().requires_grad_(False)
        self.vae = self.pipe.vae.eval().requires_grad_(False)
        for encoder in (self.pipe.text_encoder, self.pipe.text_encoder_2):
            encoder.eval().requires_grad_(False)
        self.guidance = guidance if self.transformer.config.guidance_embeds else None
        unit = self.pipe.vae_scale_factor * 2
        if resolution < unit or resolution % unit:
            raise TeacherError(f"resolution {resolution} must be a multiple of {unit} for the teacher {self.source}")
        side = resolution // unit
        self.grid = (side, side)
        self.text_tokens = min(_MAX_TEXT_TOKENS, self.pipe.tokenizer_2.model_max_length)
        object_ids, context_ids = image_ids(*self.grid), image_ids(*self.grid, stream=1)
        self._object_ids = object_ids.to(self.device, dtype)
        self._both_ids = torch.cat([object_ids, context_ids]).to(self.device, dtype)
        self.lora = Path(lora) if lora else None
        if self.lora:
            check_made_for(self.lora, self.digests()["transformer"], self.source)
            attach_lora(self.transformer, self.lora)

    def digests(self) -> dict[str, str]:
        names = (
            "transformer",
            "vae",
            "text_encoder",
            "text_encoder_2",
            "tokenizer",
            "tokenizer_2",
            "scheduler",
        )
        if not self._digests:
            self._digests = {name: component_digest(self.folder / name) for name in names}
        return self._digests

    def sigmas(self, num_steps: int) -> list[float]:
        scheduler, config = self.pipe.scheduler, self.pipe.scheduler.config
        mu = calculate_shift(
            self.grid[0] * self.grid[1],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        retrieve_timesteps(
            scheduler, num_steps, "cpu", sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu
        )
        return [float(s) for s in scheduler.sigmas[:num_steps]]

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextEmbedding:
        tokens, pooled, _ = self.pipe.encode_prompt(
            prompt=list(captions), device=self.device, max_sequence_length=self.text_tokens
        )
        return TextEmbedding(tokens.to(self.dtype), pooled.to(self.dtype))

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(to_signed(pixels.to(self.device)).to(self.dtype)).latent_dist.mode()
        return pack_latents((latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> Tensor:
        unpacked = unpack_latents(latents, *self.grid).to(self.dtype)
        pixels = self.vae.decode(unpacked / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample
        return from_signed(pixels)

    def save_lora(self, folder: Path) -> Path:
        return save_lora(FluxKontextPipeline, self.transformer, folder)

    def predict(self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding) -> Tensor:
        # diffusers' models predict ε − z; the method's E_{O,t} estimates z_O − ε.
        return -self._forward(noisy, context, sigma, text)

    @torch.no_grad()
    def features(
        self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding, taps: Sequence[str]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        velocity = "velocity" in taps
        with self._capture([t for t in taps if t != "velocity"], found, leave_early=not velocity):
            try:
                out = self._forward(noisy, context, sigma, text)
            except _TapsCaptured:
                out = None
        objects = noisy.shape[1]
        features = {tap: tokens[:, :objects] for tap, tokens in found.items()}
        if out is not None:
            features["velocity"] = -out
        return {tap: features[tap] for tap in taps}

    def taps(self) -> list[str]:
        doubles, singles = len(self.transformer.transformer_blocks), len(self.transformer.single_transformer_blocks)
        blocks = [f"double.{n}" for n in range(doubles)] + [f"single.{n}" for n in range(singles)]
        return [*blocks[:-1], "hidden", "velocity"]  # hidden is the last block's output

    def tap_shape(self, tap: str) -> TapShape:
        channels = self.transformer.config.in_channels if tap == "velocity" else self.transformer.inner_dim
        if tap != "velocity":
            self._block(tap)
        return TapShape(tap, self.grid[0] * self.grid[1], channels, self.grid)

    def _forward(self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding) -> Tensor:
        """One step of FluxKontextPipeline: ε − z for the object tokens."""
        tokens = noisy if context is None else torch.cat([noisy, context], dim=1)  # B, L or 2L, C
        guidance = None
        if self.guidance is not None:
            guidance = torch.full((len(noisy),), self.guidance, device=self.device, dtype=torch.float32)
        out = self.transformer(
            hidden_states=tokens.to(self.dtype),
            timestep=sigma.to(self.device, self.dtype),
            guidance=guidance,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.tokens,
            txt_ids=torch.zeros(text.tokens.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self._object_ids if context is None else self._both_ids,
            return_dict=False,
        )[0]
        return out[:, : noisy.shape[1]]

    def _block(self, tap: str) -> tuple[int, Any]:
        """(depth, module) whose output a tap reads; depth counts blocks from the input."""
        doubles, singles = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks
        blocks = [*doubles, *singles]
        match = re.fullmatch(r"(double|single)\.(\d+)", tap)
        if tap == "hidden":
            return len(blocks) - 1, blocks[-1]
        if match:
            group, index = (doubles, 0) if match[1] == "double" else (singles, len(doubles))
            if int(match[2]) < len(group):
                return index + int(match[2]), group[int(match[2])]
        raise TeacherError(
            f"the teacher {self.source} has no tap {tap!r}; it has velocity, hidden, "
            f"double.0–double.{len(doubles) - 1} and single.0–single.{len(singles) - 1}"
        )

    @contextmanager
    def _capture(self, taps: Sequence[str], found: dict[str, Tensor], leave_early: bool) -> Iterator[None]:
        """Read image tokens behind blocks with forward hooks; leave after the deepest, so later blocks cost nothing."""
        blocks = {tap: self._block(tap) for tap in taps}
        deepest = max((depth for depth, _ in blocks.values()), default=-1)

        def reader(tap: str, depth: int):
            def hook(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
                found[tap] = output[1]  # (text tokens, image tokens)
                if leave_early and depth == deepest and len(found) == len(blocks):
                    raise _TapsCaptured

            return hook

        handles = [m.register_forward_hook(reader(tap, depth)) for tap, (depth, m) in blocks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

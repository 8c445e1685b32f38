"""FLUX.1 (dev, Kontext, and any diffusers folder of that family) as a teacher.

The clean context follows the noisy object in one sequence, told apart by the first position axis, as in FLUX Kontext.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from pipeline.teachers.architecture import MAX_TEXT_TOKENS, Architecture, flux_architecture
from pipeline.teachers.base import TextEmbedding
from pipeline.teachers.diffusers_teacher import DiffusersTeacher

# A tokenizer with a shorter limit has the last word.
_MAX_TEXT_TOKENS = MAX_TEXT_TOKENS["flux"]


def image_ids(rows: int, columns: int, stream: int = 0) -> Tensor:
    """Rotary position ids (rows·columns, 3). Axis 0 tells streams apart: 0 the noisy object, 1 the clean context."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = stream
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(rows * columns, 3)


class FluxTeacher(DiffusersTeacher):
    """A diffusers folder of the FLUX.1 family; options as for `DiffusersTeacher`."""

    family = "flux"
    pipeline = FluxKontextPipeline
    text_components = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def __init__(self, folder: Path, **options: Any):
        super().__init__(folder, **options)
        object_ids, context_ids = image_ids(*self.grid), image_ids(*self.grid, stream=1)
        self._object_ids = object_ids.to(self.device, self.dtype)
        self._both_ids = torch.cat([object_ids, context_ids]).to(self.device, self.dtype)

    @staticmethod
    def read_shapes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Architecture:
        return flux_architecture(transformer, vae)

    def sigmas(self, num_steps: int) -> list[float]:
        config = self.scheduler.config
        mu = calculate_shift(
            self.grid[0] * self.grid[1],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        return self._visited_sigmas(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)

    @property
    def caption_tokens(self) -> int:
        return min(_MAX_TEXT_TOKENS, self.text_pipe.tokenizer_2.model_max_length)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextEmbedding:
        tokens, pooled, _ = self.text_pipe.encode_prompt(
            prompt=list(captions), device=self.device, max_sequence_length=self.caption_tokens
        )
        return TextEmbedding(tokens.to(self.dtype), pooled.to(self.dtype))

    def _forward(self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding) -> Tensor:
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

    def _object_tokens(self, output: Any, text: TextEmbedding, with_context: bool) -> Tensor:
        # Blocks return (text tokens, image tokens); the attention of single blocks is given both in one sequence.
        images = output[1] if isinstance(output, tuple) else output[:, text.tokens.shape[1] :]
        return images[:, : self.grid[0] * self.grid[1]]

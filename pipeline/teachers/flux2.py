"""FLUX.2 klein (distilled or base, and any diffusers folder of that family) as a teacher.

The clean context follows the noisy object in one sequence, as `Flux2KleinPipeline` conditions on a reference image: the
first of four position axes tells the two apart. klein has no guidance embedding; the pipeline's classifier-free
guidance mixes two predictions, of which E_{O,t} is the one that saw the caption.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor

from pipeline.teachers.architecture import Architecture, flux2_architecture
from pipeline.teachers.base import TextEmbedding
from pipeline.teachers.diffusers_teacher import DiffusersTeacher

# The pipeline's own default; a tokenizer with a shorter limit has the last word.
_MAX_TEXT_TOKENS = 512
# Where the pipeline puts its first reference image on the time axis; the image it makes is at 0.
_REFERENCE_TIME = 10


def image_ids(rows: int, columns: int, time: int = 0) -> Tensor:
    """Position ids (rows·columns, 4) of an image: time, row, column, 0."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.arange(1))


def text_ids(length: int) -> Tensor:
    """Position ids (length, 4) of text: only the last axis counts."""
    return torch.nn.functional.pad(torch.arange(length)[:, None], (3, 0))


class Flux2KleinTeacher(DiffusersTeacher):
    """A diffusers folder of the FLUX.2 klein family; options as for `DiffusersTeacher`."""

    family = "flux2"
    pipeline = Flux2KleinPipeline
    text_components = ("text_encoder", "tokenizer")

    def __init__(self, folder: Path, **options: Any):
        super().__init__(folder, **options)
        object_ids, context_ids = image_ids(*self.grid), image_ids(*self.grid, time=_REFERENCE_TIME)
        self._object_ids = object_ids.to(self.device)
        self._both_ids = torch.cat([object_ids, context_ids]).to(self.device)

    @staticmethod
    def read_shapes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Architecture:
        return flux2_architecture(transformer, vae)

    def sigmas(self, num_steps: int) -> list[float]:
        mu = compute_empirical_mu(self.grid[0] * self.grid[1], num_steps)
        return self._visited_sigmas(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextEmbedding:
        pipe = self.text_pipe
        length = min(_MAX_TEXT_TOKENS, pipe.tokenizer.model_max_length)
        tokens, _ = pipe.encode_prompt(prompt=list(captions), device=self.device, max_sequence_length=length)
        return TextEmbedding(tokens.to(self.dtype), tokens.new_zeros(len(tokens), 0))

    def _load_text(self) -> Any:
        pipe = super()._load_text()
        # Only hidden states are read; the logits of 512 tokens over Qwen3's vocabulary would be 155 MB a caption.
        pipe.text_encoder.lm_head = torch.nn.Identity()
        return pipe

    def _forward(self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding) -> Tensor:
        tokens = noisy if context is None else torch.cat([noisy, context], dim=1)  # B, L or 2L, C
        out = self.transformer(
            hidden_states=tokens.to(self.dtype),
            # The scheduler's timestep, 1000 σ, is what the pipeline rounds to the model's precision.
            timestep=(1000 * sigma).to(self.device, self.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=text.tokens,
            txt_ids=text_ids(text.tokens.shape[1]).to(self.device),
            img_ids=self._object_ids if context is None else self._both_ids,
            return_dict=False,
        )[0]
        return out[:, : noisy.shape[1]]

    def _object_tokens(self, output: Any, text: TextEmbedding, with_context: bool) -> Tensor:
        # Double blocks return (text tokens, image tokens), single blocks both in one sequence.
        images = output[1] if isinstance(output, tuple) else output[:, text.tokens.shape[1] :]
        return images[:, : self.grid[0] * self.grid[1]]

    def _normalise(self, tokens: Tensor) -> Tensor:
        mean, std = self._latent_statistics()
        return (tokens - mean) / std

    def _denormalise(self, tokens: Tensor) -> Tensor:
        mean, std = self._latent_statistics()
        return tokens * std + mean

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the packed channels (4C,), which this VAE keeps in a batch norm."""
        norm = self.vae.bn
        std = torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        return norm.running_mean.to(self.dtype), std.to(self.dtype)

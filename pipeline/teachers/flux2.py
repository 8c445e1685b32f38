"""FLUX.2 klein (distilled or base, and any diffusers folder of that family) as a teacher.

The clean context follows the noisy object in one sequence, as `Flux2KleinPipeline` conditions on a reference image: the
first of four position axes tells the two apart. klein has no guidance embedding; the pipeline's classifier-free
guidance mixes two predictions, of which E_{O,t} is the one that saw the caption.

The context may also be reused, as `Flux2KleinKVPipeline` does: its tokens attend to each other alone and are modulated
as clean ones, so that every block's keys and values of them are the same for all timesteps and texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVLayerCache,
    Flux2KVParallelSelfAttnProcessor,
)
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn import Module

from pipeline.teachers.architecture import (
    MAX_TEXT_TOKENS,
    Architecture,
    Place,
    flux2_architecture,
    says_step_distilled,
)
from pipeline.teachers.base import ContextMode, TextEmbedding
from pipeline.teachers.capture import capture
from pipeline.teachers.diffusers_teacher import DiffusersTeacher

# A tokenizer with a shorter limit has the last word.
_MAX_TEXT_TOKENS = MAX_TEXT_TOKENS["flux2"]
# Where the pipeline puts its first reference image on the time axis; the image it makes is at 0.
_REFERENCE_TIME = 10


def image_ids(rows: int, columns: int, time: int = 0) -> Tensor:
    """Position ids (rows·columns, 4) of an image: time, row, column, 0."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(rows), torch.arange(columns), torch.arange(1))


def text_ids(length: int) -> Tensor:
    """Position ids (length, 4) of text: only the last axis counts."""
    return torch.nn.functional.pad(torch.arange(length)[:, None], (3, 0))


@dataclass(frozen=True)
class _RepeatedLayer:
    """A block's keys and values of B images, for `times` rows of each; repeated only while that block runs."""

    layer: Flux2KVLayerCache
    times: int

    def get(self) -> tuple[Tensor, Tensor]:
        keys, values = self.layer.get()  # each B, L, heads, head channels
        return keys.repeat_interleave(self.times, 0), values.repeat_interleave(self.times, 0)


@dataclass(frozen=True)
class ContextKeysValues:
    """The context's keys and values in every block that ran, as `Flux2Transformer2DModel` asks for them.

    layers: in running order, `double_blocks` of them from double blocks. num_ref_tokens: L, under diffusers' name.
    times: rows of each image, in a run, that they are given to.
    """

    layers: Sequence[Flux2KVLayerCache]
    double_blocks: int
    num_ref_tokens: int
    times: int

    def get_double(self, index: int) -> _RepeatedLayer:
        return _RepeatedLayer(self.layers[index], self.times)

    def get_single(self, index: int) -> _RepeatedLayer:
        return _RepeatedLayer(self.layers[self.double_blocks + index], self.times)


class Flux2KleinTeacher(DiffusersTeacher):
    """A diffusers folder of the FLUX.2 klein family; options as for `DiffusersTeacher`.

    It was trained with a joint context; Stage I can teach it a reused one.
    """

    family = "flux2"
    contexts: ClassVar[tuple[ContextMode, ...]] = ("joint", "reused")
    pipeline = Flux2KleinPipeline
    text_components = ("text_encoder", "tokenizer")

    def __init__(self, folder: Path, **options: Any):
        super().__init__(folder, **options)
        self._object_ids = image_ids(*self.grid).to(self.device)
        self._context_ids = image_ids(*self.grid, time=_REFERENCE_TIME).to(self.device)

    @staticmethod
    def read_shapes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Architecture:
        return flux2_architecture(transformer, vae)

    def sigmas(self, num_steps: int) -> list[float]:
        mu = compute_empirical_mu(self.grid[0] * self.grid[1], num_steps)
        return self._visited_sigmas(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)

    @property
    def caption_tokens(self) -> int:
        return min(_MAX_TEXT_TOKENS, self.text_pipe.tokenizer.model_max_length)

    @property
    def step_distilled(self) -> bool:
        """Whether it was distilled to a few steps: klein, not klein-base. Folders say so as the pipeline does."""
        return says_step_distilled(str(self.folder))

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextEmbedding:
        tokens, _ = self.text_pipe.encode_prompt(
            prompt=list(captions), device=self.device, max_sequence_length=self.caption_tokens
        )
        return TextEmbedding(tokens.to(self.dtype), tokens.new_zeros(len(tokens), 0))

    def _load_text(self) -> Any:
        pipe = super()._load_text()
        # Only hidden states are read; the logits of 512 tokens over Qwen3's vocabulary would be 155 MB a caption.
        pipe.text_encoder.lm_head = torch.nn.Identity()
        return pipe

    def _load(self, *names: str) -> Any:
        pipe = super()._load(*names)
        if "transformer" in names and self.context == "reused":
            for block in pipe.transformer.transformer_blocks:
                block.attn.set_processor(Flux2KVAttnProcessor())
            for block in pipe.transformer.single_transformer_blocks:
                block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
        return pipe

    def _forward(self, noisy: Tensor, context: Any, sigma: Tensor, text: TextEmbedding) -> Tensor:
        tokens, ids = noisy, self._object_ids  # B, L, C
        reuse: dict[str, Any] = {}
        if isinstance(context, ContextKeysValues):
            reuse = {"kv_cache": context, "kv_cache_mode": "cached"}
        elif context is not None and self.context == "reused":
            # The same function in one pass, for gradients: diffusers wants the context in front here.
            tokens, ids = torch.cat([context, noisy], dim=1), torch.cat([self._context_ids, self._object_ids])
            reuse = {"kv_cache_mode": "extract", "num_ref_tokens": context.shape[1]}
        elif context is not None:
            tokens, ids = torch.cat([noisy, context], dim=1), torch.cat([self._object_ids, self._context_ids])
        return self._transform(tokens, ids, sigma, text.tokens, **reuse)[:, : noisy.shape[1]]

    def _transform(self, tokens: Tensor, ids: Tensor, sigma: Tensor, text: Tensor, **reuse: Any) -> Tensor:
        out = self.transformer(
            hidden_states=tokens.to(self.dtype),
            # The scheduler's timestep, 1000 σ, is what the pipeline rounds to the model's precision.
            timestep=(1000 * sigma).to(self.device, self.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=text,
            txt_ids=text_ids(text.shape[1]).to(self.device),
            img_ids=ids,
            return_dict=False,
            **reuse,
        )
        return out[0]

    def _share_context(self, context: Tensor, steps: int, deepest: int) -> Any:
        if self.context == "joint":
            return super()._share_context(context, steps, deepest)
        return self._keys_and_values(context, steps, deepest)

    def _keys_and_values(self, context: Tensor, steps: int, deepest: int) -> ContextKeysValues:
        """Run the context (B, L, C_latent) alone through the blocks up to the deepest that is wanted."""
        blocks, layers = self._blocks(), []

        def keep(_block: Module, _inputs: Any, options: dict[str, Any]) -> None:
            layers.append(options["joint_attention_kwargs"]["kv_cache"])

        handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
        # The context does not see the text; one token of zeros, because not every kernel takes an empty sequence.
        text = context.new_zeros(len(context), 1, self.transformer.config.joint_attention_dim, dtype=self.dtype)
        try:
            with capture(blocks, {"deepest": Place(deepest)}, leave_early=True):
                self._transform(
                    context, self._context_ids, context.new_zeros(len(context)), text,
                    kv_cache_mode="extract", num_ref_tokens=context.shape[1],
                )  # fmt: skip
        finally:
            for handle in handles:
                handle.remove()
        return ContextKeysValues(layers, len(self.transformer.transformer_blocks), context.shape[1], steps)

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


class Flux2KleinKVTeacher(Flux2KleinTeacher):
    """A FLUX.2 klein whose weights were trained with a reused context, as `Flux2KleinKVPipeline` runs it.

    That class cannot be made without its transformer; the other one loads the same folders part by part.
    """

    pipeline_name = "Flux2KleinKVPipeline"
    contexts: ClassVar[tuple[ContextMode, ...]] = ("reused",)
    only_context = "a Flux2KleinKVPipeline was trained with a context that never sees the noise"

    @property
    def step_distilled(self) -> bool:
        """Always: there is no such model that is not, and its folders do not say it."""
        return True

"""Stable Diffusion 3.5 (medium, large, and any diffusers folder of that family) as a teacher.

Neither the model nor its pipelines know a reference image. Here the clean context and the noisy object are the left and
the right half of one wide latent, so that joint attention runs over both and each has places of its own in the model's
positional table; only the right half of the output counts. It is what `StableDiffusion3Pipeline` computes for an image
twice as wide as high, were the left half of its latents kept clean. SD3 was not trained on it: Stage I has to teach it.

There is no guidance embedding; of classifier-free guidance, E_{O,t} is the prediction that saw the caption.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from pipeline.teachers.architecture import MAX_TEXT_TOKENS, Architecture, sd3_architecture
from pipeline.teachers.base import TextEmbedding
from pipeline.teachers.diffusers_teacher import DiffusersTeacher
from pipeline.teachers.packing import pack_latents, unpack_latents

# A tokenizer with a shorter limit has the last word.
_MAX_TEXT_TOKENS = MAX_TEXT_TOKENS["sd3"]


class StableDiffusion3Teacher(DiffusersTeacher):
    """A diffusers folder of the SD3 family; options as for `DiffusersTeacher`.

    T5 may be left out of the folder, as diffusers allows: its tokens are then zero. Raises TeacherError also where the
    positional table has no room for two views side by side.
    """

    family = "sd3"
    pipeline = StableDiffusion3Pipeline
    text_components = (
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    )
    optional_components = ("text_encoder_3", "tokenizer_3")

    @staticmethod
    def read_shapes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Architecture:
        return sd3_architecture(transformer, vae)

    def _load_text(self) -> Any:
        pipe = super()._load_text()
        # Where there is no T5, the pipeline asks the transformer's configuration how wide its zeros are to be.
        config = SD3Transformer2DModel.load_config(self.folder / "transformer")
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        return pipe

    def sigmas(self, num_steps: int) -> list[float]:
        config = self.scheduler.config
        if not config.get("use_dynamic_shifting"):  # as published
            return self._visited_sigmas(num_inference_steps=num_steps)
        # The schedule of the object's view alone: the context beside it is not sampled.
        mu = calculate_shift(
            self.grid[0] * self.grid[1],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
        return self._visited_sigmas(num_inference_steps=num_steps, mu=mu)

    @property
    def caption_tokens(self) -> int:
        t5 = self.text_pipe.tokenizer_3
        return min(_MAX_TEXT_TOKENS, t5.model_max_length) if t5 else _MAX_TEXT_TOKENS

    @property
    def text_length(self) -> int:
        return self.text_pipe.tokenizer.model_max_length + self.caption_tokens  # T5's tokens follow those of CLIP

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> TextEmbedding:
        tokens, _, pooled, _ = self.text_pipe.encode_prompt(
            prompt=list(captions),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.caption_tokens,
        )
        return TextEmbedding(tokens.to(self.dtype), pooled.to(self.dtype))

    def _forward(self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding) -> Tensor:
        canvas = unpack_latents(noisy, *self.grid)  # B, C, H, W
        if context is not None:
            canvas = torch.cat([unpack_latents(context, *self.grid), canvas], dim=3)  # B, C, H, 2W
        out = self.transformer(
            hidden_states=canvas.to(self.dtype),
            timestep=1000 * sigma.to(self.device, torch.float32),
            encoder_hidden_states=text.tokens,
            pooled_projections=text.pooled,
            return_dict=False,
        )[0]
        return pack_latents(out[..., -2 * self.grid[1] :])

    def _object_tokens(self, output: Any, text: TextEmbedding, with_context: bool) -> Tensor:
        _, images = output  # (text tokens, image tokens)
        rows, columns = self.grid
        if not with_context:
            return images
        return images.unflatten(1, (rows, 2 * columns))[:, :, columns:].flatten(1, 2)

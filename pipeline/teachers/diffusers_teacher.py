"""What the families have in common: a diffusers folder, frozen, its blocks read as taps.

Text encoders, VAE and transformer are loaded when they are first used and released one by one, so that a GPU never
has to hold more than the one at work.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.nn import Module

from pipeline.teachers.architecture import Architecture, read_architecture
from pipeline.teachers.base import ContextMode, ObjectCrop, Part, TapShape, TeacherError, TextEmbedding
from pipeline.teachers.capture import capture
from pipeline.teachers.loading import PLAIN, Loading, compile_blocks
from pipeline.teachers.lora import attach_lora, check_made_for, save_lora
from pipeline.teachers.offloading import offload_text_encoder, offload_transformer
from pipeline.teachers.packing import pack_latents, unpack_latents
from pipeline.teachers.pixels import from_signed, to_signed
from pipeline.teachers.quantization import pipeline_config
from pipeline.teachers.weights import check_weights, component_digest


def blocks_of(transformer: Any) -> list[Module]:
    """The transformer's blocks in the order in which they run."""
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]


class DiffusersTeacher(ABC):
    """A diffusers folder behind the `Teacher` protocol; a family adds its text, its positions and one step of its DiT.

    folder: a diffusers folder on disk. resolution: side of both views in pixels. guidance: used only where the
    configuration has guidance embeddings. lora: a LoRA in diffusers' layout, the result of Stage I. context: one of the
    family's `contexts`, by default the first.
    Raises TeacherError if the folder is not of this family, the resolution does not fit its VAE, or the family does not
    know this kind of context.
    """

    family: str
    # diffusers' pipeline class, and those of its components that embed text.
    pipeline: ClassVar[Any]
    # What folders call it, where that is another class with the same components.
    pipeline_name: ClassVar[str | None] = None
    text_components: ClassVar[tuple[str, ...]]
    optional_components: ClassVar[tuple[str, ...]] = ()
    # How its context may enter, and why not otherwise.
    contexts: ClassVar[tuple[ContextMode, ...]] = ("joint",)
    only_context: ClassVar[str] = "its context and noisy tokens attend to each other, so that nothing can be reused"

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
        context: ContextMode | None = None,
        loading: Loading = PLAIN,
    ):
        loading.check(torch.device(device))
        self.folder, self.source, self.revision = Path(folder), source or str(folder), revision
        self.resolution, self.dtype, self.device = resolution, dtype, torch.device(device)
        self.pipeline_class: str = self.pipeline_name or self.pipeline.__name__
        self.context: ContextMode = context or self.contexts[0]
        self.crop: ObjectCrop = "box"
        if self.context not in self.contexts:
            raise TeacherError(f"teacher {self.source}: {self.only_context}; use --context {self.contexts[0]}")
        self.loading, self.quantization = loading, loading.quantization
        self._digests: dict[str, str] = {}  # reading 24 GB takes a minute: once is enough
        self._parts: dict[Part, Any] = {}
        self._absent = self._find_absent()
        self.architecture = read_architecture(str(self.folder), None, type(self).read_shapes)
        self.grid = self.architecture.grid(resolution, self.source)
        self.guidance = guidance if self.architecture.guidance_embeds else None
        self.scheduler = self._load("scheduler").scheduler
        self.lora = Path(lora) if lora else None
        if self.lora:
            check_made_for(self.lora, self.digests()["transformer"], self.source, self.context)

    @property
    def step_distilled(self) -> bool:
        """Whether it was distilled to a few steps; a family that has such models knows how to tell."""
        return False

    @property
    def components(self) -> tuple[str, ...]:
        """The components of the pipeline that have a say in the features."""
        return ("transformer", "vae", *self.text_components, "scheduler")

    @property
    def transformer(self) -> Any:
        """The frozen DiT, with the LoRA if there is one."""
        return self.transformer_pipe.transformer

    @property
    def transformer_pipe(self) -> Any:
        """The pipeline with its transformer alone."""
        return self._part("transformer")

    @property
    def vae(self) -> Any:
        """The VAE."""
        return self._part("vae").vae

    @property
    def text_pipe(self) -> Any:
        """The pipeline with its text encoders and tokenizers alone."""
        return self._part("text")

    def load(self, part: Part) -> None:
        self._part(part)

    def release(self, part: Part) -> None:
        if self._parts.pop(part, None) is not None:
            clear_device_cache(garbage_collection=True)  # modules refer to each other in circles

    def encoder_identity(self, part: Part) -> dict[str, Any]:
        names = self.text_components if part == "text" else (part,)
        digests = {name: self.digests()[name] for name in names if name not in self._absent}
        identity = {"pipeline": self.pipeline_class, "dtype": str(self.dtype), "digests": digests}
        return identity if part == "text" else {**identity, "resolution": self.resolution}

    @staticmethod
    @abstractmethod
    def read_shapes(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Architecture:
        """The shapes that follow from the two configurations."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> list[float]:
        """The noise levels the pipeline visits at this resolution."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> TextEmbedding:
        """Captions as the pipeline embeds them."""

    @abstractmethod
    def _forward(self, noisy: Tensor, context: Any, sigma: Tensor, text: TextEmbedding) -> Tensor:
        """One step of the pipeline, without classifier-free guidance: ε − z for the object tokens, packed.

        context: packed latents, or what `_share_context` made of them, or None.
        """

    @abstractmethod
    def _object_tokens(self, output: Any, text: TextEmbedding, with_context: bool) -> Tensor:
        """(B, L, C), the object tokens in what was captured: a pair of text and image tokens, or both in sequence."""

    @property
    @abstractmethod
    def caption_tokens(self) -> int:
        """Tokens to which a caption is padded or cut."""

    @property
    def text_length(self) -> int:
        """Text tokens that the DiT sees: those of the caption, for families that add no others."""
        return self.caption_tokens

    def digests(self) -> dict[str, str]:
        if not self._digests:
            present = [name for name in self.components if name not in self._absent]
            self._digests = {name: component_digest(self.folder / name) for name in present}
        return self._digests

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        latents = self.vae.encode(to_signed(pixels.to(self.device)).to(self.dtype)).latent_dist.mode()
        return self._normalise(pack_latents(latents))

    @torch.no_grad()
    def decode_images(self, latents: Tensor) -> Tensor:
        unpacked = unpack_latents(self._denormalise(latents.to(self.dtype)), *self.grid)
        return from_signed(self.vae.decode(unpacked).sample)

    def save_lora(self, folder: Path) -> Path:
        return save_lora(self.pipeline, self.transformer, folder)

    def predict(self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding) -> Tensor:
        # diffusers' models predict ε − z; the method's E_{O,t} estimates z_O − ε.
        return -self._forward(noisy, context, sigma, text)

    @torch.no_grad()
    def features(
        self, noisy: Tensor, context: Tensor | None, sigma: Tensor, text: TextEmbedding, taps: Sequence[str]
    ) -> dict[str, Tensor]:
        steps = len(noisy) // len(text.tokens)
        blocks = self._blocks()
        places = {tap: self.architecture.place(tap, self.source) for tap in taps if tap != "velocity"}
        deepest = len(blocks) - 1 if "velocity" in taps else max(place.depth for place in places.values())
        given = None if context is None else self._share_context(context, steps, deepest)
        features: dict[str, Tensor] = {}
        with capture(blocks, places, "velocity" not in taps, compiled=self.loading.compile) as found:
            features["velocity"] = -self._forward(noisy, given, sigma, text.repeat(steps))
        for tap, output in found.items():
            features[tap] = self._object_tokens(output, text, context is not None)
        return {tap: features[tap] for tap in taps}

    def _share_context(self, context: Tensor, steps: int, deepest: int) -> Any:
        """The context (B, L, C_latent) as `_forward` takes it for `steps` rows of each image, computed once per image.

        deepest: the last block that will run.
        """
        return context.repeat_interleave(steps, 0)

    def _blocks(self) -> list[Module]:
        return blocks_of(self.transformer)

    def taps(self, modulated: bool = False) -> list[str]:
        return self.architecture.all_taps(modulated)

    def tap_shape(self, tap: str) -> TapShape:
        return self.architecture.tap_shape(tap, self.resolution, self.source)

    def _normalise(self, tokens: Tensor) -> Tensor:
        """Packed latents as the VAE gives them → as the DiT expects them."""
        return (tokens - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def _denormalise(self, tokens: Tensor) -> Tensor:
        return tokens / self.vae.config.scaling_factor + self.vae.config.shift_factor

    def _visited_sigmas(self, **schedule: Any) -> list[float]:
        """The sigma list of the folder's own scheduler, without the final 0."""
        scheduler = self.scheduler
        scheduler.set_timesteps(device="cpu", **schedule)
        return [float(sigma) for sigma in scheduler.sigmas[:-1]]

    def _find_absent(self) -> set[str]:
        """The components that the folder does without; raises TeacherError if it cannot, or if weights are missing."""
        absent = {name for name in self.components if not (self.folder / name).is_dir()}
        missing = sorted(absent.difference(self.optional_components))
        if missing:
            raise TeacherError(
                f"teacher {self.source}: {self.pipeline_class} does not work without {' and '.join(missing)}"
            )
        for name in self.components:
            if name not in absent:
                try:
                    check_weights(self.folder / name)
                except (ValueError, KeyError, OSError) as error:
                    raise self._incomplete(error) from None
        return absent

    def _incomplete(self, error: Exception) -> TeacherError:
        reason = str(error).splitlines()[0]
        return TeacherError(f"teacher {self.source}: not a complete {self.pipeline_class} folder ({reason})")

    def _part(self, part: Part) -> Any:
        """The pipeline with one part of the teacher, frozen; loaded if it is not there."""
        if part not in self._parts:
            pipe = self._load_text() if part == "text" else self._load(part)
            for module in pipe.components.values():
                if isinstance(module, Module):
                    module.eval().requires_grad_(False)
            if part == "transformer":
                self._prepare_transformer(pipe.transformer)
            self._parts[part] = self._offload(pipe) if self.loading.offload and part != "vae" else pipe.to(self.device)
        return self._parts[part]

    def _prepare_transformer(self, transformer: Any) -> None:
        if self.lora:
            attach_lora(transformer, self.lora)
        if self.loading.compile:
            compile_blocks(blocks_of(transformer))

    def _offload(self, pipe: Any) -> Any:
        for name, module in pipe.components.items():
            if name == "transformer" and module is not None:
                offload_transformer(module, blocks_of(module), self.device)
            elif isinstance(module, Module):
                offload_text_encoder(module, self.device)
        return pipe

    def _quantization_config(self, names: Sequence[str]) -> Any:
        kind = self.loading.quantization
        return pipeline_config(kind) if kind and "transformer" in names else None

    def _load_text(self) -> Any:
        return self._load(*self.text_components)

    def _load(self, *names: str) -> Any:
        """The pipeline with these components alone. Raises TeacherError if they are not all there."""
        return self._read_folder(names)

    def _read_folder(self, names: Sequence[str]) -> Any:
        # diffusers wants to be told what is left out on purpose.
        without = dict.fromkeys(name for name in self.components if name not in names or name in self._absent)
        try:
            pipe = self.pipeline.from_pretrained(
                self.folder, dtype=self.dtype, quantization_config=self._quantization_config(names), **without
            )
        except (OSError, ValueError) as error:
            raise self._incomplete(error) from None
        pipe.set_progress_bar_config(disable=True)
        return pipe

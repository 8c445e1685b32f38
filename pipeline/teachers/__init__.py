"""Teachers by name. A new family is one file that fulfils `base.Teacher` and one line in `_FAMILIES`."""

import logging
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.presets import TIMM_PREFIX, VAE_PREFIX
from pipeline.teachers.architecture import (
    Architecture,
    ArchitectureReader,
    flux2_architecture,
    flux_architecture,
    read_architecture,
    read_classes,
    says_step_distilled,
    sd3_architecture,
)
from pipeline.teachers.base import AnyTeacher, ContextMode, EncoderInput, TapShape, Teacher, TeacherError

if TYPE_CHECKING:
    import torch

    from pipeline.teachers.diffusers_teacher import DiffusersTeacher
    from pipeline.teachers.loading import Loading

# diffusers imports torchao where it is installed, and both have words with their own authors then.
for _name in ("torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)

__all__ = ["PRESETS", "Teacher", "TeacherError", "TeacherOutline", "load_teacher", "outline_teacher"]

_DEMO_WEIGHTS = Path(__file__).parent / "demo_weights"
# The configurations of gated or large repositories as published, without weights: folders of the diffusers layout.
_PUBLISHED = Path(__file__).parent / "published"


@dataclass(frozen=True)
class TeacherPreset:
    """Where a named teacher is found, the resolution (pixels) of its views, and its published configuration.

    published: folder of `published/`; None where the weights are in the package, and their configuration with them.
    step_distilled: whether it was distilled to a few steps, which the published configuration does not say.
    """

    source: str
    resolution: int
    published: str | None = None
    step_distilled: bool = False


PRESETS = {
    "demo": TeacherPreset(str(_DEMO_WEIGHTS), 48),
    "flux-dev": TeacherPreset("black-forest-labs/FLUX.1-dev", 512, "flux-1"),
    "flux-kontext": TeacherPreset("black-forest-labs/FLUX.1-Kontext-dev", 512, "flux-1"),
    "flux2-klein": TeacherPreset("black-forest-labs/FLUX.2-klein-4B", 512, "flux-2-klein-4b", step_distilled=True),
    "flux2-klein-base": TeacherPreset("black-forest-labs/FLUX.2-klein-base-4B", 512, "flux-2-klein-4b"),
    "sd35-medium": TeacherPreset("stabilityai/stable-diffusion-3.5-medium", 512, "sd-3.5-medium"),
    "sd35-large": TeacherPreset("stabilityai/stable-diffusion-3.5-large", 512, "sd-3.5-large"),
}
_DEFAULT_RESOLUTION = 512


@dataclass(frozen=True)
class Family:
    """adapter: module:class, imported when a teacher is loaded. architecture: its shapes, read without importing it.

    step_distilled: whether all of its weights are distilled to a few steps; otherwise their folders say it.
    """

    adapter: str
    architecture: ArchitectureReader
    step_distilled: bool = False


_FLUX = Family("pipeline.teachers.flux:FluxTeacher", flux_architecture)
# Pipeline class named in model_index.json → the family that drives its transformer.
_FAMILIES = {
    "FluxPipeline": _FLUX,
    "FluxKontextPipeline": _FLUX,
    "Flux2KleinKVPipeline": Family("pipeline.teachers.flux2:Flux2KleinKVTeacher", flux2_architecture, True),
    "Flux2KleinPipeline": Family("pipeline.teachers.flux2:Flux2KleinTeacher", flux2_architecture),
    "StableDiffusion3Pipeline": Family("pipeline.teachers.sd3:StableDiffusion3Teacher", sd3_architecture),
}

# Families whose raw features behind a late block are a known-bad choice (see `pipeline.presets`).
_READ_IN_THE_MIDDLE = ("flux", "flux2")


@dataclass(frozen=True)
class TeacherOutline:
    """What is known of a teacher before it is loaded.

    origin: where that was read, in words. configs: the folder or hub repository with its configuration files, and
    revision: that of the repository. adapter: module:class of its family. step_distilled: whether it was distilled to a
    few steps.
    """

    source: str
    resolution: int
    origin: str
    architecture: Architecture
    configs: str
    revision: str | None
    adapter: str
    step_distilled: bool = False

    def tap_shape(self, tap: str) -> TapShape:
        """Shape of a tap; raises TeacherError as the loaded teacher would."""
        return self.architecture.tap_shape(tap, self.resolution, self.source)

    def latent_values(self) -> int:
        """Numbers in the latents of one view, which are kept while a cache is made; 0 for an image encoder."""
        return self.architecture.latent_values(self.resolution, self.source)


def outline_teacher(spec: str, *, revision: str | None = None, resolution: int | None = None) -> TeacherOutline:
    """Outline a teacher by preset name, diffusers folder or hub repository, without reading weights.

    Raises TeacherError if its configuration cannot be found or is of no known family.
    """
    if spec.startswith(TIMM_PREFIX):
        from pipeline.teachers.timm_encoder import TimmEncoder, outline_architecture

        encoder, side = outline_architecture(spec, resolution)
        adapter = f"{TimmEncoder.__module__}:{TimmEncoder.__name__}"
        return TeacherOutline(spec, side, "timm's own configuration", encoder, spec, None, adapter)
    if spec.startswith(VAE_PREFIX):
        return _outline_latents(spec, revision, resolution)
    preset = PRESETS.get(spec)
    side = resolution or (preset.resolution if preset else _DEFAULT_RESOLUTION)
    configs, origin = (preset.source if preset else spec), "configuration files"
    if preset and preset.published:
        configs, origin, revision = str(_PUBLISHED / preset.published), "published configuration", None
    family = _family_of(configs, revision, named=spec)
    architecture = read_architecture(configs, revision, family.architecture)
    distilled = family.step_distilled or says_step_distilled(configs, revision)
    distilled = distilled or bool(preset and preset.step_distilled)
    return TeacherOutline(spec, side, origin, architecture, configs, revision, family.adapter, distilled)


def middle_tap(spec: str, revision: str | None = None) -> str | None:
    """The tap in the middle of a teacher of the FLUX families, where they tell most; None for other families.

    Raises TeacherError as `outline_teacher`.
    """
    architecture = outline_teacher(spec, revision=revision).architecture
    return architecture.middle() if architecture.family in _READ_IN_THE_MIDDLE else None


def _outline_latents(spec: str, revision: str | None, resolution: int | None) -> TeacherOutline:
    from pipeline.teachers.latent_encoder import LatentEncoder, latent_architecture

    whole = outline_teacher(_owner_of(spec), revision=revision, resolution=resolution)
    latents = latent_architecture(whole.architecture, whole.resolution, spec)
    return replace(
        whole, source=spec, architecture=latents, adapter=f"{LatentEncoder.__module__}:{LatentEncoder.__name__}"
    )


def _owner_of(spec: str) -> str:
    """Whose VAE `vae:NAME` is; raises TeacherError where no diffusion transformer is named."""
    owner = spec.removeprefix(VAE_PREFIX)
    if not owner or owner.startswith((VAE_PREFIX, TIMM_PREFIX)):
        raise TeacherError(f"teacher {spec}: write {VAE_PREFIX}NAME, with a diffusion transformer, e.g. vae:flux-dev")
    return owner


def quiet_libraries() -> None:
    """Leave the terminal to our own progress bars: no bar per loaded shard, no warning per truncated caption."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def load_teacher(
    spec: str,
    *,
    revision: str | None = None,
    lora: Path | None = None,
    resolution: int | None = None,
    dtype: "torch.dtype",
    device: str,
    guidance: float = 3.5,
    context: ContextMode | None = None,
    loading: "Loading | None" = None,
    input: EncoderInput = "object",
) -> AnyTeacher:
    """Load a teacher by preset name, diffusers folder, hub repository, or as an image encoder.

    Those are `timm:NAME[:weights.safetensors]`, and of any other teacher the VAE alone, `vae:NAME`. context: None as
    the family was trained. loading: None as the weights were saved. input: what an image encoder is shown. Raises
    TeacherError if it cannot be found or downloaded, is of no known family, or its family does not know that kind of
    context or input, and where the device does not allow that kind of loading.
    """
    if spec.startswith(TIMM_PREFIX):
        _refuse_for_encoders(spec, lora, context, loading)
        from pipeline.teachers.timm_encoder import TimmEncoder

        return TimmEncoder(spec, resolution=resolution, dtype=dtype, device=device, input=input)
    if spec.startswith(VAE_PREFIX):
        _refuse_for_encoders(spec, lora, context, loading)
        return _load_latents(spec, revision, resolution, dtype, device, input)
    if input != "object":
        raise TeacherError(f"teacher {spec}: it sees the object and the whole image; leave input={input} out")
    from pipeline.teachers.weights import locate

    quiet_libraries()
    preset = PRESETS.get(spec)
    folder = locate(preset.source if preset else spec, revision)
    return adapter_class(_family_of(str(folder), None, named=spec).adapter)(
        folder,
        source=spec,
        revision=revision,
        resolution=resolution or (preset.resolution if preset else _DEFAULT_RESOLUTION),
        dtype=dtype,
        device=device,
        guidance=guidance,
        lora=lora,
        context=context,
        **({"loading": loading} if loading else {}),
    )


def _load_latents(
    spec: str, revision: str | None, resolution: int | None, dtype: "torch.dtype", device: str, input: EncoderInput
) -> AnyTeacher:
    from pipeline.teachers.latent_encoder import LatentEncoder

    whole = load_teacher(_owner_of(spec), revision=revision, resolution=resolution, dtype=dtype, device=device)
    return LatentEncoder(cast("DiffusersTeacher", whole), input=input)


def _refuse_for_encoders(spec: str, lora: Path | None, context: ContextMode | None, loading: "Loading | None") -> None:
    """Raise TeacherError for what only a diffusion transformer knows."""
    from pipeline.teachers.loading import PLAIN

    if lora is not None:
        raise TeacherError(f"teacher {spec}: an image encoder has no Stage I and takes no LoRA; leave {lora} out")
    if context is not None or loading not in (None, PLAIN):
        raise TeacherError(f"teacher {spec}: an image encoder knows no --context, --quantize, --offload or --compile")


def adapter_class(adapter: str) -> Any:
    """Import the class that drives a family; adapter: module:class."""
    module, _, name = adapter.partition(":")
    return getattr(import_module(module), name)


def _family_of(spec: str, revision: str | None, named: str) -> Family:
    """The family of a diffusers folder or hub repository; named: what the user called it."""
    pipeline_class, transformer_class = read_classes(spec, revision)
    if pipeline_class not in _FAMILIES:
        raise TeacherError(
            f"teacher {named}: no adapter for {pipeline_class} with {transformer_class}; "
            f"known are {', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[pipeline_class]

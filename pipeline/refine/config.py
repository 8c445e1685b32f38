"""The settings of Stage I, checked once."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cache_schema.fields import Setting, check_limits
from pipeline.curriculum import DEFAULT_STEPS, DEFAULT_TIMESTEPS, check_timesteps

# How σ is drawn; see `pipeline.refine.draws.sigma_of`.
SigmaDistribution = Literal["uniform", "logit-normal", "shifted"]
LoraTargets = Literal["attention", "attention+ff"]


@dataclass(frozen=True)
class RefineConfig:
    """The paper's setting: Adam 1e-4, batch 1, 30 000 steps, rank 16. σ is uniform on (0, 1), as in L_CDR.

    What others do beside it is off where no preset says otherwise: σ where images take shape, clipping, captions left
    out now and then so that the refined DiT can do without, mirrored images where the build caches the view hflip.

    One optimiser step sees `batch` × `accumulate` images on each process. `timesteps` of `num_steps` are the noise
    levels that the pictures show.
    """

    steps: Annotated[int, Setting("Optimiser steps.", least=1)] = 30_000
    batch: Annotated[int, Setting("Images per step.", least=1)] = 1
    accumulate: Annotated[int, Setting("Batches per step, and per process, whose gradients add up.", least=1)] = 1
    lr: Annotated[float, Setting("Learning rate of Adam.", above=0)] = 1e-4
    rank: Annotated[int, Setting("Rank of the LoRA.", least=1)] = 16
    lora_targets: Annotated[
        LoraTargets, Setting("What the LoRA adapts: the attention projections, or the feed-forward layers as well.")
    ] = "attention"
    sigma: Annotated[
        SigmaDistribution,
        Setting("How noise levels are drawn: uniform, logit-normal (Esser et al. 2024), or shifted as the sampler's."),
    ] = "uniform"
    grad_clip: Annotated[
        float | None, Setting("Clip the norm of the gradients to this; none: not at all.", above=0)
    ] = None
    caption_dropout: Annotated[float, Setting("Share of the draws that see an empty caption.", least=0, most=1)] = 0.0
    flip: Annotated[bool, Setting("Mirror half of the draws, for a build that caches the view hflip.")] = False
    train_guidance: Annotated[
        float | None,
        Setting("Guidance that Stage I feeds to teachers that embed it, e.g. 1; default --guidance, the build's."),
    ] = None
    seed: Annotated[int, Setting("Seed of initialisation, order and noise.")] = 0
    gradient_checkpointing: Annotated[
        bool | None,
        Setting("Compute activations twice instead of keeping them; default on a GPU with no room.", resumable=True),
    ] = None
    validation_images: Annotated[int, Setting("Training images held out to measure progress.", least=1)] = 32
    validate_every: Annotated[
        int, Setting("Steps between measurements on held-out images.", least=1, resumable=True)
    ] = 1_000
    checkpoint_every: Annotated[int, Setting("Steps between checkpoints; 0 writes none.", least=0, resumable=True)] = (
        500
    )
    pictures_every: Annotated[
        int, Setting("Steps between pictures of reconstructions; 0 draws none.", least=0, resumable=True)
    ] = 5_000
    picture_images: Annotated[int, Setting("Images in a picture of reconstructions.", least=1, resumable=True)] = 4
    num_steps: Annotated[int, Setting("Length T of the pictures' scheduler.", resumable=True)] = DEFAULT_STEPS
    timesteps: Annotated[tuple[int, ...], Setting("Noise levels that the pictures show.", resumable=True)] = (
        DEFAULT_TIMESTEPS
    )

    def __post_init__(self) -> None:
        check_limits(self)
        check_timesteps(list(self.timesteps), self.num_steps)

"""The settings of Stage I, checked once."""

from dataclasses import dataclass
from typing import Annotated

from cache_schema.fields import Setting, check_limits
from pipeline.curriculum import DEFAULT_STEPS, DEFAULT_TIMESTEPS, check_timesteps


@dataclass(frozen=True)
class RefineConfig:
    """The paper's setting: Adam 1e-4, batch 1, 30 000 steps, rank 16. σ is uniform on (0, 1), as in L_CDR.

    One optimiser step sees `batch` × `accumulate` images on each process. gradient_checkpointing: None does so on a
    GPU. `timesteps` of `num_steps` are the noise levels that the pictures show.
    """

    steps: Annotated[int, Setting("Optimiser steps.", least=1)] = 30_000
    batch: Annotated[int, Setting("Images per step.", least=1)] = 1
    accumulate: Annotated[int, Setting("Batches per step, and per process, whose gradients add up.", least=1)] = 1
    lr: Annotated[float, Setting("Learning rate of Adam.", above=0)] = 1e-4
    rank: Annotated[int, Setting("Rank of the LoRA.", least=1)] = 16
    seed: Annotated[int, Setting("Seed of initialisation, order and noise.")] = 0
    gradient_checkpointing: Annotated[
        bool | None,
        Setting("Compute activations twice instead of keeping them; default on a GPU.", resumable=True),
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

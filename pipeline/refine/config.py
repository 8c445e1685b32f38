"""The settings of Stage I, checked once."""

from dataclasses import dataclass

from cache_schema.errors import DitDistillError
from pipeline.curriculum import DEFAULT_STEPS, DEFAULT_TIMESTEPS, check_timesteps


@dataclass(frozen=True)
class RefineConfig:
    """The paper's setting: Adam 1e-4, batch 1, 30 000 steps, rank 16. σ is uniform on (0, 1), as in L_CDR.

    One optimiser step sees `batch` × `accumulate` images on each process. The `*_every` fields count steps; 0 turns
    checkpoints or pictures off. gradient_checkpointing: compute activations twice instead of keeping them; None does so
    on a GPU. `timesteps` of `num_steps` are the noise levels that the pictures show.
    """

    steps: int = 30_000
    batch: int = 1
    accumulate: int = 1
    lr: float = 1e-4
    rank: int = 16
    seed: int = 0
    gradient_checkpointing: bool | None = None
    validation_images: int = 32
    validate_every: int = 1_000
    checkpoint_every: int = 500
    pictures_every: int = 5_000
    picture_images: int = 4
    num_steps: int = DEFAULT_STEPS
    timesteps: tuple[int, ...] = DEFAULT_TIMESTEPS

    def __post_init__(self) -> None:
        least = {"checkpoint_every": 0, "pictures_every": 0}
        for name in (
            "steps", "batch", "accumulate", "rank", "validation_images", "validate_every", "checkpoint_every",
            "pictures_every", "picture_images",
        ):  # fmt: skip
            if getattr(self, name) < least.get(name, 1):
                option = name.replace("_", "-")
                raise DitDistillError(f"--{option} must be at least {least.get(name, 1)}, not {getattr(self, name)}")
        if not self.lr > 0:
            raise DitDistillError(f"--lr must be positive, not {self.lr}")
        check_timesteps(list(self.timesteps), self.num_steps)

"""Defaults per data set: what `--dataset NAME` means when nothing else is said. No model library is imported here."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """Defaults of one data set; every field has an option of the same name that overrides it.

    refine_*: Stage I. The other fields: the build (see `pipeline.build_config.BuildConfig`).
    """

    teacher: str = "flux-kontext"
    refine_steps: int = 30_000
    refine_batch: int = 1
    refine_lr: float = 1e-4
    timesteps: tuple[int, ...] = (10, 16, 22, 28)
    views: tuple[str, ...] = ("canonical",)
    feature_splits: tuple[str, ...] = ("train", "unlabeled")
    image_size: int = 224
    image_format: str = "jpeg"
    batch: int = 4


PRESETS: dict[str, Preset] = {
    "demo": Preset(
        teacher="demo",
        refine_steps=200,
        refine_batch=8,
        refine_lr=1e-4,
        timesteps=(22, 28),
        views=("canonical", "hflip"),
        # Test features are cached too, so that the teacher's own recall can be measured (rows 2 and 3 of the paper).
        feature_splits=("train", "unlabeled", "test"),
        image_size=96,
        image_format="png",
        batch=16,
    ),
}


def preset_for(dataset: str) -> Preset:
    """The preset of a data set; the paper's settings where it has none of its own."""
    return PRESETS.get(dataset, Preset())


def run_folder(dataset: str) -> Path:
    """Where everything made from a data set goes unless told otherwise."""
    return Path("runs") / dataset

"""What a probe compares, checked once."""

from dataclasses import dataclass
from typing import Annotated, get_args

from cache_schema.errors import DitDistillError
from cache_schema.fields import Setting, check_limits
from cache_schema.format.vocabulary import DEFAULT_MASSIVE_FACTOR, MassiveChannels
from pipeline.curriculum import DEFAULT_STEPS, check_timesteps
from pipeline.datasets.base import SPLITS


def read_taps(text: str) -> list[str]:
    """Names a,b,c, or all, which no name says."""
    return [] if text == "all" else [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True)
class ProbeConfig:
    """What is probed. Images are `per_class` of as many classes of `split` as make up about `images`.

    The default split is `train`: nothing here is fitted to labels of other classes, and a choice made on the test
    classes would be a choice made on the test set. cells: features are averaged over cells × cells places, flattened.
    """

    taps: Annotated[tuple[str, ...], Setting("Taps to compare, or all.", reads=read_taps, shown="all")] = ()
    modulated: Annotated[
        bool, Setting("With all taps: also what the attention of every block reads, double.N.modulated.")
    ] = False
    massive_channels: Annotated[
        tuple[str, ...],
        Setting("Compare massive channels kept, removed, standardised: keep,remove,standardize."),
    ] = ("keep",)
    massive_factor: Annotated[
        float, Setting("A channel is massive from so many times the median of the channels on.", above=1)
    ] = DEFAULT_MASSIVE_FACTOR
    timesteps: Annotated[tuple[int, ...], Setting("Timesteps to compare.")] = (4, 7, 10, 13, 16, 19, 22, 25, 28)
    num_steps: Annotated[int, Setting("Length T of the scheduler.")] = DEFAULT_STEPS
    images: Annotated[int, Setting("Images to look at, about.", least=4)] = 300
    per_class: Annotated[int, Setting("Images of each class.", least=2)] = 10
    split: Annotated[str, Setting("Where they come from; choosing on test would be choosing on the test set.")] = (
        "train"
    )
    cells: Annotated[int, Setting("Features are averaged over N x N places, then flattened.", least=1)] = 4
    recommend: Annotated[int, Setting("How many timesteps to recommend.", least=1)] = 4
    seed: Annotated[int, Setting("Seed of the noise.")] = 0
    batch: Annotated[int, Setting("Images per forward pass.", least=1, resumable=True)] = 4

    def __post_init__(self) -> None:
        check_timesteps(list(self.timesteps), self.num_steps)
        check_limits(self)
        known = get_args(MassiveChannels)
        chosen = self.massive_channels
        if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(known):
            raise DitDistillError(f"--massive-channels {','.join(chosen)}: name one or more of {', '.join(known)}")
        if self.massive_factor != DEFAULT_MASSIVE_FACTOR and set(chosen) == {"keep"}:
            raise DitDistillError(
                f"--massive-factor {self.massive_factor:g}: massive channels are only kept; add remove or standardize "
                "to --massive-channels"
            )
        if self.split not in SPLITS:
            raise DitDistillError(f"--split {self.split}: name one of {', '.join(SPLITS)}")

    @property
    def treatments(self) -> tuple[MassiveChannels, ...]:
        """What is done to massive channels, each."""
        return tuple(kind for kind in get_args(MassiveChannels) if kind in self.massive_channels)

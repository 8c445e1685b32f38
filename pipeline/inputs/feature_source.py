"""Where the features of samples come from: a diffusion transformer and its conditions, or an image encoder and pixels.

The build, the probe and the estimate ask a source and need not know which kind of teacher stands behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.curriculum import add_noise, sample_noise
from pipeline.datasets.base import Dataset, Sample
from pipeline.inputs.condition_store import ConditionStore
from pipeline.inputs.conditions import WHOLE, Conditions, Pixels, read_pixels
from pipeline.inputs.framing import Framing
from pipeline.teachers.base import ImageEncoder, Teacher
from pipeline.teachers.host_features import HostFeatures
from pipeline.teachers.passes import Forward, Passes, memory_errors

NO_ROOM = "its weights do not fit: use --quantize int8 or fp8, --offload, --dtype bfloat16 or a larger device"


@dataclass(frozen=True)
class Wanted:
    """Which features: of these taps, under these views, at these noise levels; seed: that of the noise.

    framing: how the views are cut.
    """

    taps: tuple[str, ...]
    views: tuple[str, ...]
    sigmas: tuple[float, ...]
    seed: int = 0
    framing: Framing = WHOLE


class FeatureSource(Protocol):
    """Computes the features of samples, a batch at a time."""

    def prepare(
        self,
        samples: Sequence[Sample],
        digests: Mapping[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = tqdm.write,
    ) -> float:
        """Do once, before the first batch, what the samples need; arguments as of `ConditionStore.prepare`.

        Returns the seconds that took, once what does it was loaded.
        """
        ...

    def read(self, samples: Sequence[Sample]) -> Any:
        """What `compute` needs of a batch, in main memory. Safe in another thread while a batch is computed."""
        ...

    def compute(self, samples: Sequence[Sample], given: Any) -> dict[str, Tensor]:
        """{tap: (B, V, T, L, C)} of a batch, in main memory, from what `read` gave.

        Raises OutOfMemory where it does not fit.
        """
        ...


class DiffusionSource:
    """E_{O,t} of a diffusion transformer: prompt embeddings and latents first, then noise and a forward pass.

    passes: how a batch is cut; None takes it as one.
    """

    def __init__(self, teacher: Teacher, store: ConditionStore, wanted: Wanted, passes: Passes | None = None) -> None:
        self._teacher, self._store, self._wanted, self._passes = teacher, store, wanted, passes

    def prepare(
        self,
        samples: Sequence[Sample],
        digests: Mapping[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = tqdm.write,
    ) -> float:
        return self._store.prepare(samples, self._wanted.views, digests, check, log).seconds

    def read(self, samples: Sequence[Sample]) -> dict[str, Conditions]:
        return {view: self._store.read(samples, view) for view in self._wanted.views}

    def compute(self, samples: Sequence[Sample], given: Mapping[str, Conditions]) -> dict[str, Tensor]:
        # Not by the first pass: where the weights do not fit, smaller passes do not help, and each would load them.
        with memory_errors("while loading the diffusion transformer", NO_ROOM):
            self._teacher.load("transformer")
        return teacher_features(self._teacher, samples, given, self._wanted, self._passes)


class EncoderSource:
    """The tokens of an image encoder, of the crop or of the whole image: one pass, and one timestep without noise."""

    def __init__(self, encoder: ImageEncoder, dataset: Dataset, wanted: Wanted, passes: Passes | None = None) -> None:
        self._encoder, self._dataset, self._wanted, self._passes = encoder, dataset, wanted, passes

    def prepare(
        self,
        samples: Sequence[Sample],
        digests: Mapping[str, str] | None = None,
        check: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = tqdm.write,
    ) -> float:
        """Nothing: pixels are read batch by batch."""
        return 0.0

    def read(self, samples: Sequence[Sample]) -> dict[str, Pixels]:
        wanted = self._wanted
        return read_pixels(self._dataset, samples, self._encoder.resolution, wanted.views, wanted.framing)

    @torch.no_grad()
    def compute(self, samples: Sequence[Sample], given: Mapping[str, Pixels]) -> dict[str, Tensor]:
        def forward(view: str) -> Forward:
            pixels = given[view].object if self._encoder.input == "object" else given[view].context
            return lambda images, _: self._encoder.encode(pixels[images], self._wanted.taps)

        return _computed(self._passes, len(samples), 1, self._wanted.views, forward)


@torch.no_grad()
def teacher_features(
    teacher: Teacher,
    samples: Sequence[Sample],
    conditions: Mapping[str, Conditions],
    wanted: Wanted,
    passes: Passes | None = None,
) -> dict[str, Tensor]:
    """E_{O,t} of a batch of samples, in main memory: {tap: (B, V, T, L, C)}.

    conditions: of the samples, for each view. passes: how the batch is cut; None takes it as one. Raises OutOfMemory
    where that is too much for the device, and passes were given.
    """

    def forward(view: str) -> Forward:
        def run(images: slice, timesteps: slice) -> dict[str, Tensor]:
            given = conditions[view].rows(images).to(teacher.device)
            levels = list(wanted.sigmas[timesteps])
            B, T = len(given.object), len(levels)
            shape = tuple(given.object.shape[1:])
            noise = torch.stack([sample_noise(s.id, view, wanted.seed, shape) for s in samples[images]])
            sigma = torch.tensor(levels).repeat(B).to(given.object.device)  # B·T, timesteps fastest
            clean, noise = (x.to(given.object).repeat_interleave(T, 0) for x in (given.object, noise))
            return teacher.features(add_noise(clean, noise, sigma), given.context, sigma, given.text, wanted.taps)

        return run

    return _computed(passes, len(samples), len(wanted.sigmas), wanted.views, forward)


def _computed(
    passes: Passes | None,
    images: int,
    timesteps: int,
    views: Sequence[str],
    forward: Callable[[str], Forward],
) -> dict[str, Tensor]:
    """{tap: (B, V, T, L, C)} in main memory, in passes or without any, at once: running out of memory is then the
    caller's to explain. forward: of a view."""
    features = HostFeatures(images, timesteps, len(views))
    for number, view in enumerate(views):
        if passes is not None:
            passes.fill(features, number, forward(view))
        else:
            whole = slice(0, images), slice(0, timesteps)
            features.put(number, *whole, forward(view)(*whole))
    return features.ready()

"""Whether the build keeps the DiT busy: how long it waits between two batches for what is done with features."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from benchmarks.gpu_check.features import TAPS
from benchmarks.gpu_check.scene import SIGMAS, Failed, Scene
from cache_schema import create_cache
from cache_schema.format.samples import samples_table
from cache_schema.writing.claims import Claims
from pipeline.build.config import BuildConfig
from pipeline.build.describe import describe_cache
from pipeline.build.features import FeatureBuilder
from pipeline.build.run import scan_for
from pipeline.datasets import open_dataset
from pipeline.datasets.base import Sample
from pipeline.inputs.feature_source import Wanted, teacher_features
from pipeline.inputs.tolerance import BadSamples, Tolerance
from pipeline.teachers.diffusers_teacher import DiffusersTeacher

BATCHES = 6  # each of a few images
MOST_IDLE = 0.05


class _Watched:
    """A source of features that notes when each batch began and ended; conditions are random and in main memory."""

    def __init__(self, scene: Scene, teacher: DiffusersTeacher) -> None:
        self.teacher, self.wanted = teacher, Wanted(TAPS, ("canonical",), SIGMAS)
        self.spans: list[tuple[float, float]] = []
        _, self.given, _ = scene.inputs(teacher)

    def prepare(self, samples: Sequence[Sample], *arguments: Any) -> float:
        return 0.0

    def read(self, samples: Sequence[Sample]) -> Any:
        return {"canonical": self.given.rows(slice(0, len(samples)))}

    def compute(self, samples: Sequence[Sample], given: Mapping[str, Any]) -> dict[str, Tensor]:
        started = time.perf_counter()
        found = teacher_features(self.teacher, samples, given, self.wanted)
        self.spans.append((started, time.perf_counter()))
        return found


def idle(scene: Scene) -> str:
    """The share of the time from the first batch to the last in which no batch was computed."""
    source = _Watched(scene, scene.teacher())
    config = BuildConfig(
        taps=TAPS, batch=scene.images, encoding="bfloat16", samples_per_shard=2 * scene.images, with_images=False
    )
    dataset = open_dataset("demo", None, scene.images * BATCHES)
    scanned = scan_for(dataset, config, Tolerance(), _silent)
    table = samples_table([sample.row() for sample in scanned])
    writer = create_cache(scene.scratch / "idle", describe_cache(source.teacher, dataset, config, table), table)
    bad = BadSamples(Tolerance(), len(scanned), _silent)
    with Claims(writer.folder) as claims:
        FeatureBuilder(writer, claims, source, config, [s for s in scanned if s.ok], bad).run()
    spans = source.spans[1:]  # the first one warms up
    if len(spans) < 2:
        raise Failed(f"{len(source.spans)} batches are too few to tell")
    whole = spans[-1][1] - spans[0][0]
    share = 1 - sum(ended - started for started, ended in spans) / whole
    # A batch of the demo teacher takes milliseconds, less than what Python does between two of them.
    if scene.real and share > MOST_IDLE:
        raise Failed(f"the DiT waits for {share:.0%} of the time")
    return f"{share:.1%} of {whole:.2f} s in {len(spans)} batches"


_silent: Callable[[str], None] = lambda line: None  # noqa: E731

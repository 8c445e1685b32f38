"""What an embedding costs: by the student, by timm's network alone, and by the student with GIM and teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.device import autocast, full_precision
from trainer.methods.method import Method
from trainer.models.student import Student, create_network
from trainer.reports.bench_config import BenchConfig

if TYPE_CHECKING:
    from cache_schema import Cache

PLAIN, STUDENT, INJECTED = "timm's network alone", "student", "student + GIM"
_LEAST = 5  # calls, however long they take
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call, by percentile, and images a second by the median."""

    calls: int
    p50: float
    p90: float
    p99: float
    images_per_second: float


@dataclass(frozen=True)
class Bench:
    """Timings by line, for one image and for a batch; `teacher_ms` is what the build took for each image, if known."""

    single: dict[str, Timing]
    batch: dict[str, Timing]
    teacher_ms: float | None
    teacher_said: str

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


@torch.inference_mode()
def run_bench(
    student: Student,
    config: BenchConfig,
    device: torch.device,
    method: Method | None = None,
    cache: Cache | None = None,
) -> Bench:
    """Time the forward passes side by side, in turns, so that a busy moment of the machine is everybody's.

    `method`: the run's own with what it needs at test time, for the line with the GIM. `cache`: for the teacher's.
    """
    student = student.eval().to(device)
    plain = create_network(student.name, student.kwargs)[0].eval().to(device)
    # The same weights: random ones may give activations so small that a processor computes them slowly.
    plain.load_state_dict(student.network.state_dict())
    timings = [
        _time(_calls(student, plain, method, count, config, device), count, config, device)
        for count in (1, config.batch)
    ]
    milliseconds, said = build_time(cache)
    return Bench(timings[0], timings[1], milliseconds, said)


def format_bench(bench: Bench, batch: int) -> str:
    """The table a person reads; ratios are of timm's network alone, by the median."""
    lines = [
        f"{'':22}{'one image, ms':>24}{'':>10}{f'{batch} images':>16}",
        f"{'':22}{'p50':>8}{'p90':>8}{'p99':>8}{'ratio':>10}{'images/s':>16}{'ratio':>10}",
    ]
    for name, single in bench.single.items():
        many = bench.batch[name]
        lines.append(
            f"{name:22}{single.p50:8.2f}{single.p90:8.2f}{single.p99:8.2f}{single.p50 / bench.single[PLAIN].p50:9.2f}x"
            f"{many.images_per_second:16.1f}{many.p50 / bench.batch[PLAIN].p50:9.2f}x"
        )
    if bench.teacher_ms is not None and INJECTED in bench.single:
        one = bench.single[INJECTED].p50 + bench.teacher_ms
        each = bench.batch[INJECTED].p50 / batch + bench.teacher_ms  # of a batch
        lines.append(
            f"{'  + teacher':22}{one:8.1f}{'':16}{one / bench.single[PLAIN].p50:9.1f}x{1000 / each:16.2f}"
            f"{each * batch / bench.batch[PLAIN].p50:9.1f}x"
        )
    if bench.teacher_said:
        lines.append(bench.teacher_said)
    return "\n".join(lines)


def _calls(
    student: Student, plain: nn.Module, method: Method | None, count: int, config: BenchConfig, device: torch.device
) -> dict[str, Call]:
    """What is timed, by line, on inputs that lie on the device already: reading and decoding are the same for all."""
    random = torch.Generator().manual_seed(0)
    size = student.input_size
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=random).to(device)
    normalised = student.normalise(pixels)
    calls: dict[str, Call] = {
        PLAIN: lambda: plain(normalised),
        STUDENT: lambda: F.normalize(student(pixels), dim=-1),
    }
    if method is not None and method.auxiliary_names:
        injector, features = method.eval().to(device), _features(method, count, random, device)
        calls[INJECTED] = lambda: injector.auxiliary(student(pixels), features)
    return {name: _in_precision(call, config, device, student.network) for name, call in calls.items()}


def _features(method: Method, count: int, random: torch.Generator, device: torch.device) -> Mapping[str, Tensor]:
    """Features of the shapes that a method reads at test time, (N, P, L, C_t) each."""
    shapes = {name: method.shapes[name] for name in method.needed.features}
    return {
        name: torch.randn(count, len(s.timesteps), s.tokens, s.channels, generator=random).to(device)
        for name, s in shapes.items()
    }


def _in_precision(call: Call, config: BenchConfig, device: torch.device, network: nn.Module) -> Call:
    def run() -> object:
        if config.precision == "float32":
            with full_precision(device):
                return call()
        with autocast(device, config.precision, network):
            return call()

    return run


def _time(calls: Mapping[str, Call], count: int, config: BenchConfig, device: torch.device) -> dict[str, Timing]:
    """Call each in turn until all have had their seconds; one that is slow has fewer calls, never less than a few."""
    for call in calls.values():
        for _ in range(config.warmup):
            call()
    _finish(device)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    while any(sum(own) < config.seconds or len(own) < _LEAST for own in taken.values()):
        for name, call in calls.items():
            own = taken[name]
            if sum(own) >= config.seconds and len(own) >= _LEAST:
                continue
            started = time.perf_counter()
            call()
            _finish(device)
            own.append(time.perf_counter() - started)
    return {name: _timing(np.array(own), count) for name, own in taken.items()}


def _timing(seconds: np.ndarray, count: int) -> Timing:
    p50, p90, p99 = (float(value) for value in np.percentile(1000 * seconds, [50, 90, 99]))
    return Timing(len(seconds), p50, p90, p99, 1000 * count / p50)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_time(cache: Cache | None) -> tuple[float | None, str]:
    """Milliseconds that the build of a cache took for a view of an image, and what to say of that."""
    if cache is None:
        return None, ""
    made, teacher = cache.manifest.provenance, cache.manifest.teacher
    views, rows = len(cache.manifest.views), cache.manifest.dataset.feature_rows
    if not made.seconds or not rows:
        return None, f"teacher {teacher.family}: the cache does not say how long its build took"
    milliseconds = 1000 * made.seconds / (rows * views)
    where = made.device or "a device that it does not name"
    return milliseconds, (
        f"teacher {teacher.family}: {milliseconds:.0f} ms for each image, not measured here but by the build of the "
        f"cache ({made.seconds:.0f} s for {rows:,} images, views: {views}, on {where}, decoding and writing included)"
    )

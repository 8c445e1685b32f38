"""A build whose shards Ray hands out to workers, on this machine or on a cluster that shares the cache's directory.

A worker is an actor that loads the teacher once and is given runs of shards. What it commits is in the journal, which
is all that anybody needs to know: a worker that is killed costs the shard that it was computing, its run goes to
another one, and a driver that died is started again like any build. Every worker may join when its machine does.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cache_schema.errors import DitDistillError
from cache_schema.format.manifest import Manifest
from cache_schema.writing.claims import Claims
from cache_schema.writing.creation import continue_cache
from cache_schema.writing.writer import CacheWriter
from pipeline.build.config import BuildConfig
from pipeline.build.part import Deadline, Part, StoppedEarly
from pipeline.datasets.base import Dataset
from pipeline.inputs.scan import ScannedSample
from pipeline.inputs.tolerance import BadSamples, Tolerance
from pipeline.teachers.base import AnyTeacher

if TYPE_CHECKING:
    from pipeline.build.features import FeatureBuilder

# So many runs of shards for each worker, so that the last one to finish is not far behind the others.
_RUNS_PER_WORKER = 8
_LONGEST_RUN = 32
# Workers that die without having committed anything: then it is not their machine that is at fault.
_FRUITLESS_DEATHS = 5
_PAUSE = 0.2  # seconds


class RayError(DitDistillError):
    """Ray cannot be used, or its workers cannot work; the message says why."""


@dataclass(frozen=True)
class Cluster:
    """Where the workers run: address of a running cluster, None for one of this machine alone. gpus: of each worker."""

    workers: int
    gpus: float
    address: str | None = None


@dataclass(frozen=True)
class Work:
    """What every worker is told once. open_teacher, open_dataset: called in the worker's own process."""

    open_teacher: Callable[[], AnyTeacher]
    open_dataset: Callable[[], Dataset]
    config: BuildConfig
    output: Path
    conditions: Path
    tolerance: Tolerance
    scanned: Sequence[ScannedSample]
    until: float | None = None  # seconds since 1970: no shard is begun that cannot be finished by then
    folder: Path = field(default_factory=Path.cwd)  # relative paths are those of the driver


class Assigned:
    """The shards that a worker was given last."""

    def __init__(self) -> None:
        self.shards: frozenset[int] = frozenset()

    def of(self, shards: Iterable[int]) -> list[int]:
        """Those of the shards that are given."""
        return [shard for shard in shards if shard in self.shards]


class Worker:
    """Loads the teacher once, and computes the shards that it is given; an actor of Ray, or an object of a test."""

    def __init__(self, work: Work) -> None:
        self._work, self._assigned = work, Assigned()
        self._builder: FeatureBuilder | None = None

    def build(self, shards: Sequence[int]) -> str | None:
        """Compute and commit shards; with none, only begin the cache. Returns what went wrong, as one line."""
        try:
            if self._builder is None:
                self._builder = self._begin()
            self._assigned.shards = frozenset(shards)
            if shards:
                self._builder.run()
        except StoppedEarly:
            return None
        except DitDistillError as error:
            return str(error)
        return None

    def _begin(self) -> "FeatureBuilder":
        from pipeline.build.features import FeatureBuilder
        from pipeline.build.run import begin_cache, hung_rows
        from pipeline.build.source import source_for
        from pipeline.teachers.passes import Passes

        work = self._work
        with contextlib.suppress(OSError):  # a machine that has no such folder may need none
            os.chdir(work.folder)
        teacher, dataset, config = work.open_teacher(), work.open_dataset(), work.config
        writer = begin_cache(teacher, dataset, config, work.output, work.scanned)
        sigmas = writer.manifest.curriculum.sigmas
        passes = Passes(config.batch_images, len(sigmas), adaptive=config.batch == "auto")
        source = source_for(teacher, dataset, config, sigmas, work.conditions, passes)
        usable = [sample for sample in work.scanned if sample.ok]
        bad = BadSamples(work.tolerance, len(work.scanned))
        bad.recount(len(work.scanned) - len(usable))
        part = Part(self._assigned, None if work.until is None else Deadline(work.until))
        return FeatureBuilder(
            writer, Claims(writer.folder), source, config, usable, bad, part=part, hung=hung_rows(writer, usable)
        )


def build_with_ray(work: Work, cluster: Cluster, log: Callable[[str], None] = tqdm.write) -> CacheWriter:
    """Have workers build everything of a cache but its seal; returns its writer.

    Student images are written here, beside them. Raises RayError where Ray is missing or cannot be reached, and where
    workers fail or go on dying.
    """
    ray = started(cluster)
    try:
        return Driver(ray, work, cluster, log).run()
    finally:
        ray.shutdown()


def the_library() -> Any:
    """Return Ray; raises RayError where it is not installed."""
    # Nobody is told that it is used here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RayError("--engine ray needs Ray: pip install 'dit-distill[ray]'") from None
    return ray


def started(cluster: Cluster) -> Any:
    """Return Ray, connected to a cluster or with one of this machine; raises RayError where that is not possible."""
    ray = the_library()
    options: dict[str, Any] = {"address": cluster.address} if cluster.address else {
        "num_cpus": max(os.cpu_count() or 1, cluster.workers), "include_dashboard": False,
    }  # fmt: skip
    ours = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RayError(f"--address {cluster.address}: no Ray cluster can be reached there ({reason})") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            # Ray prints the stack of its own libraries upon SIGTERM; a build ends in one line.
            for number, handler in ours.items():
                signal.signal(number, handler)
    return ray


class Driver:
    """Hands runs of shards to whichever worker is free, until the journal has them all."""

    def __init__(self, ray: Any, work: Work, cluster: Cluster, log: Callable[[str], None]) -> None:
        self._ray, self._work, self._cluster, self._log = ray, work, cluster, log
        self._shared = ray.put(work)
        # A dead worker is not started again by Ray: it would not know what it was doing.
        self._actor = ray.remote(num_gpus=cluster.gpus, num_cpus=1, max_restarts=0)(Worker)
        self._running: dict[Any, tuple[Any, list[int]]] = {}  # future: worker, its run
        self._fruitless = 0
        self._last_run: set[int] = set()

    def run(self) -> CacheWriter:
        self.look_for_gpus()
        for _ in range(self._cluster.workers):
            self._hire()
        # Whichever is ready first begins the cache; the others find it begun.
        writer = self._first()
        stop = Event()
        with Claims(writer.folder) as claims, ThreadPoolExecutor(1) as pool:
            images = pool.submit(self._write_images, writer, claims, stop)
            try:
                self._compute(writer, images.done)
                images.result()
            finally:
                stop.set()
        return writer

    def look_for_gpus(self) -> None:
        """Say where workers will have to wait for machines; raise RayError where none can come."""
        there = float(self._ray.cluster_resources().get("GPU", 0))
        if there >= self._cluster.gpus * self._cluster.workers:
            return
        if self._cluster.address is None and there < self._cluster.gpus:
            raise RayError(
                f"--gpus-per-worker {self._cluster.gpus:g}: this machine has {there:g} GPUs; use --gpus-per-worker 0, "
                "or --address for a cluster that has some"
            )
        self._log(f"Ray has {there:g} GPUs now; workers begin as machines with more of them join")

    def _first(self) -> CacheWriter:
        while True:
            worker = self._finished_one()
            if worker is not None:
                self._idle = [worker]
                return continue_cache(self._work.output)

    def _compute(self, writer: CacheWriter, check: Callable[[], object]) -> None:
        missing = writer.missing_shards()
        with tqdm(total=len(missing), desc="shards", unit="shard") as bar:
            while missing:
                check()
                taken = {shard for _, run in self._running.values() for shard in run}
                for worker in self._idle:
                    free = [shard for shard in missing if shard not in taken]
                    run = free[: self._length(len(missing))]
                    taken.update(run)
                    # One that has nothing to do may be needed where another dies.
                    if run:
                        self._give(worker, run)
                self._idle = [w for w in self._idle if all(w is not busy for busy, _ in self._running.values())]
                if not self._running:
                    raise StoppedEarly(f"{len(missing)} shards of {writer.folder} left; run the same command again")
                worker = self._finished_one()
                left = writer.missing_shards()
                bar.update(len(missing) - len(left))
                if len(left) < len(missing):
                    self._fruitless = 0
                elif self._work.until is None:
                    # Workers of a driver that was killed may hold what is left, for the moment that they outlive it.
                    time.sleep(_PAUSE)
                missing = left
                if worker is not None and (self._work.until is None or not self._last_run.intersection(missing)):
                    self._idle.append(worker)

    def _length(self, missing: int) -> int:
        return min(_LONGEST_RUN, max(1, missing // (_RUNS_PER_WORKER * self._cluster.workers)))

    def _write_images(self, writer: CacheWriter, claims: Claims, stop: Event) -> None:
        from pipeline.build.student_images import write_student_images

        usable = [sample for sample in self._work.scanned if sample.ok]
        write_student_images(writer, claims, self._work.open_dataset(), self._work.config, usable, stop=stop)

    def _hire(self) -> None:
        self._give(self._actor.remote(self._shared), [])

    def _give(self, worker: Any, run: list[int]) -> None:
        self._running[worker.build.remote(run)] = (worker, run)

    def _finished_one(self) -> Any:
        """Wait for one worker to finish; returns it, or None where it died and another was hired."""
        (future,), _ = self._ray.wait(list(self._running), num_returns=1)
        worker, run = self._running.pop(future)
        self._last_run = set(run)
        try:
            problem = self._ray.get(future)
        except self._ray.exceptions.RayActorError:
            self._fruitless += 1
            if self._fruitless >= _FRUITLESS_DEATHS:
                raise RayError(
                    f"{_FRUITLESS_DEATHS} workers died one after the other and committed nothing; build with --engine "
                    "local to see why"
                ) from None
            lost = f"what it did not commit of shards {', '.join(map(str, run))}" if run else "its work"
            self._log(f"a worker died; {lost} goes to another")
            self._hire()
            return None
        if problem is not None:
            raise RayError(f"a worker failed: {problem}")
        return worker


def sealed_after(work: Work, cluster: Cluster, log: Callable[[str], None] = tqdm.write) -> Manifest:
    """Build a cache with Ray and seal it. Raises as `build_with_ray` and `CacheWriter.seal`."""
    from pipeline.build.provenance import provenance_of
    from pipeline.build.run import count_failed

    writer = build_with_ray(work, cluster, log)
    bad = BadSamples(work.tolerance, len(work.scanned), log)
    bad.recount(sum(not sample.ok for sample in work.scanned) + count_failed(writer))
    bad.check()
    sealed = writer.seal(provenance_of(), min_cosine=work.config.min_cosine)
    log(f"sealed {work.output}: {sealed.dataset.feature_rows} images with features")
    return sealed

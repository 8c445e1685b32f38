"""A build whose shards Ray hands out to workers, on this machine or on a cluster, into a folder that all of them see or
into a place elsewhere.

A worker is an actor that loads the teacher once and is given runs of shards. What it commits is in the journal, which
is all that anybody needs to know: a worker that is killed costs the shard that it was computing, its run goes to
another one, and a driver that died is started again like any build. Every worker may join when its machine does. One
that takes too long over a batch is killed by the driver, which hears from an actor of its own what each is at.
"""

import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

from tqdm import tqdm

from cache_schema.errors import DitDistillError
from cache_schema.format.manifest import Manifest
from cache_schema.storage.local import LocalFolder
from cache_schema.writing.claims import Claims
from cache_schema.writing.creation import continue_cache
from cache_schema.writing.writer import CacheWriter
from pipeline.build.engines.ray_worker import Bell, Work, Worker
from pipeline.build.part import StoppedEarly
from pipeline.inputs.tolerance import BadSamples
from pipeline.watchdog import known_hangs, leave_out

# So many runs of shards for each worker, so that the last one to finish is not far behind the others.
_RUNS_PER_WORKER = 8
_LONGEST_RUN = 32
# Workers that die without having committed anything: then it is not their machine that is at fault.
_FRUITLESS_DEATHS = 5
_PAUSE = 0.2  # seconds
_LOOK = 1.0  # seconds between questions whether a worker hangs


class RayError(DitDistillError):
    """Ray cannot be used, or its workers cannot work; the message says why."""


@dataclass(frozen=True)
class Cluster:
    """Where the workers run: address of a running cluster, None for one of this machine alone. gpus: of each worker."""

    workers: int
    gpus: float
    address: str | None = None


def build_with_ray(
    work: Work, cluster: Cluster, log: Callable[[str], None] = tqdm.write, folder: LocalFolder | None = None
) -> CacheWriter:
    """Have workers build everything of a cache but its seal; returns its writer.

    folder: what is built, by way of `work.output`, where that is elsewhere. Student images are written here, beside the
    workers. Raises RayError where Ray is missing or cannot be reached, and where workers fail or go on dying.
    """
    ray = started(cluster)
    try:
        return Driver(ray, work, cluster, log, folder).run()
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

    def __init__(
        self,
        ray: Any,
        work: Work,
        cluster: Cluster,
        log: Callable[[str], None],
        folder: LocalFolder | None = None,
    ) -> None:
        self._ray, self._work, self._cluster, self._log = ray, work, cluster, log
        self._folder = folder or LocalFolder(work.output)
        self._shared = ray.put(work)
        # A dead worker is not started again by Ray: it would not know what it was doing.
        self._actor = ray.remote(num_gpus=cluster.gpus, num_cpus=1, max_restarts=0)(Worker)
        self._running: dict[Any, tuple[_Hired, list[int]]] = {}  # future: worker, its run
        self._numbers = itertools.count()
        self._idle: list[_Hired] = []
        self._hung: set[int] = set()  # the numbers of workers that were killed because they hung
        self._fruitless = 0
        self._last_run: set[int] = set()
        seconds = work.config.batch_timeout
        self._bell = None if seconds is None else ray.remote(num_cpus=0)(Bell).remote(seconds)

    def run(self) -> CacheWriter:
        self.look_for_gpus()
        for place in range(self._cluster.workers):
            self._hire(place)
        # Whichever is ready first begins the cache; the others find it begun.
        writer = self._first()
        stop = Event()
        with Claims(writer.folder) as claims, ThreadPoolExecutor(1) as pool:
            images = pool.submit(self._write_images, writer, claims, stop)

            def check() -> None:
                if images.done():
                    images.result()

            try:
                self._compute(writer, check)
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
                return continue_cache(self._folder)

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
                finished = self._finished_one()
                left = writer.missing_shards()
                bar.update(len(missing) - len(left))
                if len(left) < len(missing):
                    self._fruitless = 0
                elif self._work.until is None:
                    # Workers of a driver that was killed may hold what is left, for the moment that they outlive it.
                    time.sleep(_PAUSE)
                missing = left
                if finished is not None and (self._work.until is None or not self._last_run.intersection(missing)):
                    self._idle.append(finished)

    def _length(self, missing: int) -> int:
        return min(_LONGEST_RUN, max(1, missing // (_RUNS_PER_WORKER * self._cluster.workers)))

    def _write_images(self, writer: CacheWriter, claims: Claims, stop: Event) -> None:
        from pipeline.build.student_images import write_student_images

        usable = [sample for sample in self._work.scanned if sample.ok]
        write_student_images(writer, claims, self._work.open_dataset(), self._work.config, usable, stop=stop)

    def _hire(self, place: int) -> None:
        """Have a worker begin in a place that no other one has now."""
        number = next(self._numbers)
        say = None if self._bell is None else Ring(self._bell, number)
        self._give(_Hired(self._actor.remote(self._shared, place, say), place, number), [])

    def _give(self, worker: "_Hired", run: list[int]) -> None:
        hung = known_hangs(self._work.output, "teacher")
        self._running[worker.actor.build.remote(run, hung)] = (worker, run)

    def _finished_one(self) -> "_Hired | None":
        """Wait for one worker to finish; returns it, or None where it died and another was hired."""
        while not (ready := self._ray.wait([*self._running], num_returns=1, timeout=self._patience)[0]):
            self._end_hung()
        worker, run = self._running.pop(ready[0])
        self._last_run = set(run)
        try:
            problem = self._ray.get(ready[0])
        except self._ray.exceptions.RayActorError:
            if worker.number in self._hung:
                self._hire(worker.place)
                return None
            self._fruitless += 1
            if self._fruitless >= _FRUITLESS_DEATHS:
                raise RayError(
                    f"{_FRUITLESS_DEATHS} workers died one after the other and committed nothing; build with --engine "
                    "local to see why"
                ) from None
            lost = f"what it did not commit of shards {', '.join(map(str, run))}" if run else "its work"
            self._log(f"a worker died; {lost} goes to another")
            self._hire(worker.place)
            return None
        if problem is not None:
            raise RayError(f"a worker failed: {problem}")
        return worker

    @property
    def _patience(self) -> float | None:
        return None if self._bell is None else _LOOK

    def _end_hung(self) -> None:
        """Kill the workers that take too long over something, and note what."""
        seconds = self._work.config.batch_timeout
        assert self._bell is not None
        assert seconds is not None
        late = self._ray.get(self._bell.late.remote())
        for worker in [worker for worker, _ in self._running.values() if worker.number in late]:
            self._hung.add(worker.number)
            self._ray.kill(worker.actor)
            for work in late[worker.number]:
                self._log(leave_out(self._work.output, work, seconds))


@dataclass(frozen=True)
class _Hired:
    """A worker. place: what it has in common with the one whose place it took; number: that no other ever had."""

    actor: Any
    place: int
    number: int


@dataclass(frozen=True)
class Ring:
    """How a worker says what it is at: by the time it goes on, the bell has heard of it."""

    bell: Any
    number: int

    def __call__(self, message: dict) -> None:
        the_library().get(self.bell.note.remote(self.number, message))


def sealed_after(
    work: Work, cluster: Cluster, log: Callable[[str], None] = tqdm.write, folder: LocalFolder | None = None
) -> Manifest:
    """Build a cache with Ray and seal it; arguments and errors as of `build_with_ray` and `CacheWriter.seal`."""
    from pipeline.build.provenance import provenance_of
    from pipeline.build.run import count_failed

    writer = build_with_ray(work, cluster, log, folder)
    bad = BadSamples(work.tolerance, len(work.scanned), log)
    bad.recount(sum(not sample.ok for sample in work.scanned) + count_failed(writer))
    bad.check()
    sealed = writer.seal(provenance_of(), min_cosine=work.config.min_cosine)
    log(f"sealed {writer.folder}: {sealed.dataset.feature_rows} images with features")
    return sealed

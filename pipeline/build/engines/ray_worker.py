"""What a worker of Ray does: load the teacher once, and compute and commit the shards that it is given."""

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cache_schema.errors import DitDistillError
from cache_schema.sharing.spool import SpooledFolder, default_spool, shared_folder
from cache_schema.writing.claims import Claims
from pipeline.build.config import BuildConfig
from pipeline.build.part import Deadline, Part, StoppedEarly
from pipeline.datasets.base import Dataset
from pipeline.inputs.condition_store import default_store
from pipeline.inputs.scan import ScannedSample
from pipeline.inputs.tolerance import BadSamples, Tolerance
from pipeline.teachers.base import AnyTeacher
from pipeline.watchdog import WatchedWork, WorkInHand, listen

if TYPE_CHECKING:
    from pipeline.build.features import FeatureBuilder


@dataclass(frozen=True)
class Place:
    """A cache elsewhere that workers build, each by way of a spool on its machine. token: of the driver's spool.

    spool: a folder for them, each with one of its own beside it; by default below the user's cache directory.
    """

    url: str
    token: str
    spool: Path | None = None

    def folder(self, worker: int) -> SpooledFolder:
        """The folder that a worker builds in."""
        here = default_spool(f"{self.url} worker {worker}")
        if self.spool is not None:
            here = self.spool.with_name(f"{self.spool.name}-worker-{worker}")
        return shared_folder(self.url, here, self.token)


@dataclass(frozen=True)
class Work:
    """What every worker is told once. open_teacher, open_dataset: called in the worker's own process.

    output: of the cache, or the driver's spool of one that is `elsewhere`.
    """

    open_teacher: Callable[[], AnyTeacher]
    open_dataset: Callable[[], Dataset]
    config: BuildConfig
    output: Path
    conditions: Path | None
    tolerance: Tolerance
    scanned: Sequence[ScannedSample]
    until: float | None = None  # seconds since 1970: no shard is begun that cannot be finished by then
    folder: Path = field(default_factory=Path.cwd)  # relative paths are those of the driver
    elsewhere: Place | None = None


class Assigned:
    """The shards that a worker was given last."""

    def __init__(self) -> None:
        self.shards: frozenset[int] = frozenset()

    def of(self, shards: Iterable[int]) -> list[int]:
        """Those of the shards that are given."""
        return [shard for shard in shards if shard in self.shards]


class Worker:
    """Loads the teacher once, and computes the shards that it is given; an actor of Ray, or an object of a test.

    place: its number among those that work at a time. say: to whom it says what it begins and ends, if anybody listens.
    """

    def __init__(self, work: Work, place: int = 0, say: Callable[[dict], object] | None = None) -> None:
        self._work, self._place, self._assigned = work, place, Assigned()
        self._builder: FeatureBuilder | None = None
        self._hung: dict[int, str] = {}
        if say is not None:
            listen(say)

    def build(self, shards: Sequence[int], hung: Mapping[str, str] = MappingProxyType({})) -> str | None:
        """Compute and commit shards; with none, only begin the cache. Returns what went wrong, as one line.

        hung: id → why a sample is not shown to the teacher.
        """
        try:
            usable = (entry.sample.id for entry in self._work.scanned if entry.ok)
            self._hung |= {row: hung[name] for row, name in enumerate(usable) if name in hung}
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
        folder = None if work.elsewhere is None else work.elsewhere.folder(self._place)
        output = work.output if folder is None else folder.path
        writer = begin_cache(teacher, dataset, config, output, work.scanned, elsewhere=folder)
        sigmas = writer.manifest.curriculum.sigmas
        passes = Passes(config.batch_images, len(sigmas), adaptive=config.batch == "auto")
        source = source_for(teacher, dataset, config, sigmas, work.conditions or default_store(output), passes)
        usable = [sample for sample in work.scanned if sample.ok]
        bad = BadSamples(work.tolerance, len(work.scanned))
        bad.recount(len(work.scanned) - len(usable))
        part = Part(self._assigned, None if work.until is None else Deadline(work.until))
        self._hung |= hung_rows(writer, usable)
        return FeatureBuilder(writer, Claims(writer.folder), source, config, usable, bad, part=part, hung=self._hung)


class Bell:
    """Is told by workers what they begin and end, and knows who is late; an actor of Ray, or an object of a test."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._workers: dict[int, WorkInHand] = {}

    def note(self, worker: int, message: dict[str, Any]) -> None:
        """Take what a worker says, who has this number and no other one."""
        self._workers.setdefault(worker, WorkInHand(self._seconds)).note(message)

    def late(self) -> dict[int, list[WatchedWork]]:
        """Return what takes too long, by worker; each of them is told of once."""
        found = {worker: late for worker, at in self._workers.items() if (late := at.late())}
        for worker in found:
            del self._workers[worker]
        return found

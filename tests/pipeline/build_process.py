"""Real `dit-cache build` processes that can be stopped at a chosen moment, forked from one that has imported torch.

Importing the model libraries takes seconds; a process forked after that starts in milliseconds. Everything else is as
in a shell: its own process id, its own signals, its own exit code.
"""

import ctypes
import multiprocessing
import os
import resource
from signal import Signals
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

import pipeline.build
import pipeline.datasets.demo
import pipeline.teachers.flux  # noqa: F401 - imported here so that no forked process has to
from cache_schema.cli import run
from pipeline.cli import app

_CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir"}
_CAP_DAC_OVERRIDE = 1


@dataclass(frozen=True)
class Moment:
    """The `count`-th change of a path that contains `path` (a file opened to be written, renamed, ...): `signal` comes.

    The change itself has not happened yet. With signal None nothing comes; the changes are only counted.
    """

    path: str
    count: int = 0
    signal: Signals | None = None


class _Watch:
    """An audit hook, which Python calls before every operation on a file, in whatever thread."""

    def __init__(self, moment: Moment) -> None:
        self.moment, self.seen, self._lock = moment, 0, threading.Lock()

    def __call__(self, event: str, arguments: tuple) -> None:
        if not (event in _CHANGES or (event == "open" and arguments[2] & (os.O_CREAT | os.O_RDWR | os.O_WRONLY))):
            return
        if self.moment.path not in f"{arguments[0]} {arguments[1]}":
            return
        with self._lock:
            self.seen += 1
            now = self.seen == self.moment.count
        if now and self.moment.signal is not None:
            os.kill(os.getpid(), self.moment.signal)


def _build(arguments: list[str], log: str, moment: Moment | None, largest_file: int | None, obey_modes: bool) -> None:
    """What runs in the forked process."""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    watch = _Watch(moment) if moment else None
    if watch:
        sys.addaudithook(watch)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if obey_modes:
        _give_up_override()
    try:
        run(app, ["build", *arguments], name="dit-cache")
    finally:
        if watch:
            print(f"changes: {watch.seen}", flush=True)


def _give_up_override() -> None:
    """Make root obey the permissions of files, as everybody else does (capset(2), version 3 of its structures)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    sets[0] &= ~(1 << _CAP_DAC_OVERRIDE)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


class BuildProcesses:
    """Starts builds; `teacher` is a diffusers folder."""

    def __init__(self, teacher: Path, logs: Path) -> None:
        self.teacher, self.logs = teacher, logs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._started = 0

    def start(
        self,
        cache: Path,
        *options: str,
        moment: Moment | None = None,
        largest_file: int | None = None,
        obey_modes: bool = False,
    ) -> "BuildProcess":
        self._started += 1
        log = self.logs / f"{self._started}.log"
        arguments = ["--teacher", str(self.teacher), "--output", str(cache), *options]
        process = self._context.Process(
            target=_build, args=(arguments, str(log), moment, largest_file, obey_modes), daemon=True
        )
        process.start()
        return BuildProcess(process, log)

    def run(self, cache: Path, *options: str, expect: int = 0, **limits: object) -> str:
        """Run a build to its end; return what it said."""
        process = self.start(cache, *options, **limits)  # type: ignore[arg-type]
        code, said = process.wait()
        assert code == expect, f"exit {code}: {said}"
        return said


@dataclass(frozen=True)
class BuildProcess:
    """A build that was started."""

    process: multiprocessing.process.BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self) -> tuple[int, str]:
        """Its exit code (negative: the signal that ended it) and what it said, without progress bars."""
        self.process.join()
        lines = self.log.read_text().replace("\r", "\n").splitlines() if self.log.exists() else []
        code = self.process.exitcode
        assert code is not None
        return code, "\n".join(line for line in lines if "it/s" not in line and "image/s" not in line and "|" not in line)

"""Real `dit-cache build` processes that can be stopped at a chosen moment, forked from one that has imported torch.

Importing the model libraries takes seconds; a process forked after that starts in milliseconds. Everything else is as
in a shell: its own process id, its own signals, its own exit code.
"""

import ctypes
import hashlib
import json
import multiprocessing
import os
import re
import resource
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch

import pipeline.build.run
import pipeline.chain.forecast
import pipeline.datasets.demo
import pipeline.probe.picture
import pipeline.refine.loop
import pipeline.teachers.flux  # noqa: F401 - imported here so that no forked process has to
from cache_schema.cli import run
from cache_schema.storage.files import sweep_own_files
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


def contents(cache: Path) -> dict[str, str]:
    """Digest of every file, the manifest without the part that says when and where it was built."""
    digests = {}
    for path in sorted(p for p in cache.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "manifest.json":
            document = json.loads(data)
            document.pop("provenance")
            data = json.dumps(document, sort_keys=True).encode()
        digests[str(path.relative_to(cache))] = hashlib.sha256(data).hexdigest()
    return digests


def committed_files(cache: Path) -> dict[Path, tuple[int, int]]:
    """The files of every committed shard, each with what changes when it is written again: inode and time."""
    records = [json.loads(path.read_text()) for path in (cache / "journal").glob("*-*.json")]
    shards = [record for record in records if record["kind"] in ("features", "images")]
    files = [cache / name for record in shards for name in record["files"]]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


class Watch:
    """An audit hook, which Python calls before every operation on a file, in whatever thread.

    victim: the process that the signal goes to, by default this one. An inactive watch sees nothing.
    """

    def __init__(self, moment: Moment, victim: int | None = None) -> None:
        self.moment, self.seen, self._lock = moment, 0, threading.Lock()
        self.victim, self.active = victim, True
        self.written: list[int] = []

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.active or not (
            event in _CHANGES or (event == "open" and arguments[2] & (os.O_CREAT | os.O_RDWR | os.O_WRONLY))
        ):
            return
        paths = f"{arguments[0]} {arguments[1]}"
        shard = re.search(r"/features/hidden/c/([0-9]+)/.*\.tmp-", paths)
        with self._lock:
            if event == "open" and shard:
                self.written.append(int(shard[1]))
            self.seen += self.moment.path in paths
            now = self.moment.path in paths and self.seen == self.moment.count
        if now and self.moment.signal is not None:
            os.kill(self.victim or os.getpid(), self.moment.signal)


def _build(arguments: list[str], log: str, moment: Moment | None, largest_file: int | None, obey_modes: bool) -> None:
    """What runs in the forked process."""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    watch = Watch(moment or Moment("/journal/"))
    sys.addaudithook(watch)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if obey_modes:
        _give_up_override()
    try:
        run(app, ["build", *arguments], name="dit-cache")
    finally:
        sweep_own_files()  # as a process does at its end, which one that was forked does not
        Path(log).with_suffix(".json").write_text(json.dumps({"changes": watch.seen, "written": watch.written}))


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
        self._context.set_forkserver_preload(["tiny_annotators", __name__, "run_process"])
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
        arguments = ["--teacher", str(self.teacher), "--taps", "hidden", "--output", str(cache), *options]
        process = self._context.Process(
            target=_build, args=(arguments, str(log), moment, largest_file, obey_modes), daemon=True
        )
        process.start()
        return BuildProcess(process, log)

    def run(self, cache: Path, *options: str, expect: int = 0, **limits: Any) -> "Ended":
        """Run a build to its end."""
        ended = self.start(cache, *options, **limits).wait()
        assert ended.code == expect, f"exit {ended.code}: {ended.said}"
        return ended


@dataclass(frozen=True)
class Ended:
    """A build that came to its end. code: negative for the signal that ended it. said: without progress bars.

    changes: how often the moment's path was changed; written: the feature shards it wrote (none if it was killed).
    """

    code: int
    said: list[str]
    changes: int = 0
    written: tuple[int, ...] = ()


@dataclass(frozen=True)
class BuildProcess:
    """A build that was started."""

    process: multiprocessing.process.BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def stopped(self) -> bool:
        """Whether SIGSTOP has taken effect."""
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"

    def wait(self) -> Ended:
        """Wait for its end."""
        self.process.join()
        code = self.process.exitcode
        assert code is not None
        text = self.log.read_text().replace("\r", "\n") if self.log.exists() else ""
        said = [line for line in text.splitlines() if line.strip() and not re.search(r"\d+%\|", line)]
        report = self.log.with_suffix(".json")
        known = json.loads(report.read_text()) if report.exists() else {"changes": 0, "written": []}
        return Ended(code, said, known["changes"], tuple(known["written"]))

"""Real `dit-cache run` processes, forked like builds, whose steps are forked too instead of started anew.

That saves every step the seconds in which it would import torch and diffusers. The rest is as in a shell: each step has
a process of its own, whose standard input is a pipe from the command.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from build_process import BuildProcess, BuildProcesses, Ended, Moment, Watch
from tiny_annotators import photograph

import pipeline.chain.process
from cache_schema.cli import run
from cache_schema.storage.files import sweep_own_files
from pipeline.cli import app

_SETTINGS = (
    "annotate.boxes=dataset", "annotate.captions=dataset", "annotate.batch=2", "annotate.save_every=2",
    "refine.steps=4", "refine.batch=2", "refine.rank=2", "refine.checkpoint_every=1", "refine.validation_images=2",
    "refine.pictures_every=0", "probe.images=4", "probe.per_class=2", "probe.timesteps=22,28",
    "build.taps=hidden",
    "build.timesteps=22,28", "build.feature_splits=train,test", "build.image_size=16", "build.samples_per_shard=2",
)  # fmt: skip
SMALL = ("--resolution", "32", *(word for setting in _SETTINGS for word in ("--set", setting)))


class _Forked:
    """What `run_process` uses of a `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], watch: Watch) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.dup2(reading, 0)
                os.close(writing)
                watch.active = True
                run(app, list(arguments), name="dit-cache")
            except SystemExit as leaving:
                code = int(leaving.code or 0)
            finally:
                sweep_own_files()  # as a process does at its end, which one that was forked does not
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(code)
        os.close(reading)
        self.stdin = os.fdopen(writing, "wb")

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _run(arguments: list[str], log: str, moment: Moment | None, in_step: bool, hit_command: bool) -> None:
    """What runs in the forked process.

    in_step: the moment comes in a step's process rather than in the command's. hit_command: the signal goes to the
    command, wherever the moment comes.
    """
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    watch = Watch(moment or Moment("nowhere"), victim=os.getpid() if hit_command else None)
    watch.active = not in_step
    sys.addaudithook(watch)

    def start(arguments: Sequence[str], held: int) -> _Forked:
        before, watch.active = watch.active, False
        try:
            return _Forked(arguments, watch if in_step else Watch(Moment("nowhere")))
        finally:
            watch.active = before

    pipeline.chain.process.start = start  # type: ignore[assignment]
    try:
        run(app, ["run", *arguments], name="dit-cache")
    finally:
        sweep_own_files()
        Path(log).with_suffix(".json").write_text(json.dumps({"changes": watch.seen, "written": []}))


class RunProcesses(BuildProcesses):
    """Starts runs of twelve pictures with the tiny teacher: six of two classes to train on, as many to test."""

    def __init__(self, teacher: Path, logs: Path) -> None:
        super().__init__(teacher, logs)
        self.pictures = logs / "pictures"
        for k, name in enumerate(("ant", "bee", "fly", "wasp")):
            (self.pictures / name).mkdir(parents=True)
            for i in range(3):
                (self.pictures / name / f"{i}.png").write_bytes(photograph(40, 30 + i, 10 * k + i))

    def start_run(
        self,
        folder: Path,
        *options: str,
        moment: Moment | None = None,
        in_step: bool = True,
        hit_command: bool = False,
        bare: bool = False,
    ) -> BuildProcess:
        """bare: with nothing but the options given here."""
        self._started += 1
        log = self.logs / f"run-{self._started}.log"
        given = ["--dataset", "folder", "--data", str(self.pictures), "--teacher", str(self.teacher)]
        arguments = ["--output", str(folder), *([] if bare else [*given, *SMALL]), *options]
        process = self._context.Process(target=_run, args=(arguments, str(log), moment, in_step, hit_command))
        process.start()
        return BuildProcess(process, log)

    def finish(self, folder: Path, *options: str, expect: int = 0, **how: object) -> Ended:
        """Run to its end."""
        ended = self.start_run(folder, *options, **how).wait()  # type: ignore[arg-type]
        assert ended.code == expect, f"exit {ended.code}: {ended.said}"
        return ended

"""Going through the steps of a run: what is done is skipped, what is stale is refused, the rest is done in order."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cache_schema.errors import DitDistillError
from cache_schema.storage.files import make_directory, storage_errors
from pipeline.chain import steps as work
from pipeline.chain.next_step import next_line
from pipeline.chain.process import run_process
from pipeline.chain.state import RunFolder, State, config_for, lora_for, output_of, stale_results
from pipeline.config import RunConfig, Step, save_config
from pipeline.datasets.base import Sample

CONFIG_NAME = "run.json"
Log = Callable[[str], None]


class StaleResults(DitDistillError):  # noqa: N818 - says what happened, as the errors of cache_schema do
    """A result in the run folder was made with another configuration."""


def run_steps(
    config: RunConfig,
    folder: Path,
    samples: Sequence[Sample],
    *,
    overwrite: bool = False,
    repair: bool = False,
    log: Log = print,
) -> None:
    """Do every step that is not done yet, each in a process of its own, and save the configuration.

    samples: those of the data set. overwrite: take results of another configuration away, with all that came of them.
    repair: look for damage in the cache even if it is done. Raises StaleResults before anything is done or changed.
    """
    with storage_errors(folder):
        make_directory(folder)
    with exclusive(folder, log) as held:
        run = RunFolder(folder, config, samples)
        stale = stale_results(run.states())
        if stale and not overwrite:
            raise StaleResults(refusal(stale, folder))
        run.sweep()
        for state in stale:
            log(f"{state.step}: removing {state.output}")
            run.remove(state.step)
        save_config(config, folder / CONFIG_NAME)
        for step in config.steps:
            if step == "build":
                # From here on a second run helps, as a second builder does.
                held.release()
            _do(run, step, held.descriptor, repair and step == "build", log)
        last = config.steps[-1]
        seen = config_for(config, folder, last)
        log(next_line(last, seen, output_of(folder, last), lora_for(config, folder)))


def _do(run: RunFolder, step: Step, held: int, repair: bool, log: Log) -> None:
    state = run.state(step)
    if state.name == "done" and not repair:
        log(f"{step}: done already, {state.output}")
        return
    if state.name == "stale":
        raise StaleResults(refusal(stale_results(run.states()), run.folder))
    doing = {"begun": "going on with", "unknown": "looking at", "done": "repairing"}.get(state.name, "making")
    log(f"{step}: {'checking' if step == 'verify' else doing} {state.output}")
    record = run.begin(state)
    if step == "verify":
        work.verify_cache(state.output)
    else:
        arguments = ["run", "--config", str(run.folder / CONFIG_NAME), "--output", str(run.folder), "--step", step]
        arguments += ["--repair"] if repair and state.name != "to do" else []
        run_process(step, arguments, held)
    run.finish(step, record)


def do_step(config: RunConfig, folder: Path, step: Step, *, repair: bool = False) -> None:
    """Do one step in this process, whatever is recorded of it."""
    seen, output = config_for(config, folder, step), output_of(folder, step)
    if step == "annotate":
        work.annotate_images(seen, output, alone=False)
    elif step == "refine":
        work.refine_teacher(seen, output, alone=False)
    elif step == "probe":
        work.probe_teacher(seen, lora_for(config, folder), output, alone=False)
    elif step == "build":
        work.build_cache(seen, lora_for(config, folder), output, repair=repair, alone=False)
    else:
        work.verify_cache(output)


def refusal(stale: list[State], folder: Path) -> str:
    """One line: what differs, and what to do."""
    first, more = stale[0], len(stale[0].differing) - 1
    *others, last = [state.output.name for state in stale]
    old = f"go on with the old one by --config {folder / CONFIG_NAME}, " if first.settings else ""
    return (
        f"{first.output} was made with {'another configuration' if first.settings else 'other inputs'}: "
        f"{first.differing[0]}{f' (and {more} more)' if more else ''}; {old}choose another folder with --output, or "
        f"remove and make again {', '.join(others)}{' and ' if others else ''}{last} with --overwrite"
    )


class Held:
    """A lock on a run folder. descriptor: of the folder; a process that inherits it holds the lock too."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def release(self) -> None:
        """Let others in."""
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)


@contextlib.contextmanager
def exclusive(folder: Path, log: Log = print) -> Iterator[Held]:
    """Wait until nobody else works in the folder: another run, or a step whose run was killed and that is just ending.

    On a file system without locks this does nothing.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for the other run in {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        yield Held(descriptor)
    finally:
        os.close(descriptor)

"""A step in a process of its own, which ends with the command that started it.

Nothing of a step's models can then be left in memory, on the GPU or off it, when the next one loads its own; and every
step starts from the same clean state whether the ones before it ran now or last week, so that a resumed run ends in the
same bytes. A step ends when its standard input does. So it stops in the same orderly way whether the command was
interrupted or killed, and wherever a signal arrived: at the command alone, or at every process of a terminal or a job.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from cache_schema.errors import DitDistillError
from pipeline.watchdog import end_with


def start(arguments: Sequence[str], held: int) -> "subprocess.Popen[bytes]":
    """Start `dit-cache` with arguments; standard input is a pipe. held: a descriptor that it keeps open."""
    # -P: a folder called pipeline in the working directory is none of ours.
    command = [sys.executable, "-P", "-m", "pipeline.cli", *arguments]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited; Ctrl-C comes by way of the pipe
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[held])
    finally:
        signal.signal(signal.SIGINT, before)


def run_process(step: str, arguments: Sequence[str], held: int) -> None:
    """Run `dit-cache` with arguments to its end. An error leaves with its exit code: it has said what is wrong.

    Raises DitDistillError if a signal ended the process, KeyboardInterrupt after an interruption it had nothing to say
    about.
    """
    process = start(arguments, held)
    assert process.stdin is not None
    interrupted = False
    try:
        code = process.wait()
    except KeyboardInterrupt:
        interrupted = True
        process.stdin.close()
        code = process.wait()
    if code < 0:
        print(file=sys.stderr)  # its progress bar stands there still
    if interrupted and code <= 0:
        raise KeyboardInterrupt
    if code < 0:
        raise DitDistillError(
            f"{step} was ended by {signal.Signals(-code).name}, as a machine short of memory does; run the same "
            "command again: it resumes"
        )
    if code:
        raise SystemExit(code)


def end_with_standard_input() -> None:
    """Interrupt this process, as SIGTERM does, when whoever started it is gone or closes the pipe."""

    threading.Thread(target=end_with, args=(0,), daemon=True).start()

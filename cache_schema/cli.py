"""The one way both commands run: errors in one line with what helps, exit codes that scripts can rely on."""

import contextlib
import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

import typer

from cache_schema.advice import advised
from cache_schema.devices import prepare_memory
from cache_schema.errors import DitDistillError, printable
from cache_schema.interrupts import leaving

EXIT_ERROR = 1
_SPINS = "1000"  # of libgomp's 300 000
# What typer itself exits with on Ctrl-C, without a word.
_TYPER_INTERRUPTED = 130

# Failures of the machine rather than of the program: a traceback would tell the user nothing.
_USER_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
}

# Where a path can begin in an argument: `~/x`, `--data=~/x`, `data.root=~/x`, and in a list of paths.
_HOME = re.compile(r"(?:^|(?<=[=,]))~[\w.-]*(?=/|,|$)")


def run(
    app: typer.Typer,
    argv: list[str] | None = None,
    *,
    name: str | None = None,
    interrupted_hint: str = "run the same command again; finished work is kept",
) -> NoReturn:
    """Run a typer app and leave the process with a meaningful exit code.

    Exit codes: 0 success, 1 a reported error or an interruption (Ctrl-C, SIGTERM, SIGHUP), 2 wrong usage, or that of an
    error that has its own. `--debug`,
    wherever it stands among the options, adds the full traceback; it is taken out of the arguments, so an app declares
    it only to list it in its help. `~` at the beginning of a path is a home. `argv` defaults to the process's own
    arguments, `name` to the program's own name.
    """
    _let_others_work()
    prepare_memory()
    arguments, debug = _take_debug(sys.argv[1:] if argv is None else argv)
    if not debug:
        sys.excepthook = _report_bug
    arguments = [expand_home(argument) for argument in arguments]
    command = typer.main.get_command(app)
    try:
        with _interruptible():
            command.main(args=arguments, prog_name=name, standalone_mode=True)
    except DitDistillError as error:
        _fail(advised(error), debug, error.exit_code, error.prefix)
    except OSError as error:
        if error.errno not in _USER_ERRNOS:
            raise
        _fail(_describe_os_error(error), debug)
    except KeyboardInterrupt:
        _interrupted(interrupted_hint)
    except SystemExit as leaving:
        if leaving.code == _TYPER_INTERRUPTED:
            _interrupted(interrupted_hint)
        raise
    sys.exit(0)


def expand_home(argument: str) -> str:
    """An argument with `~` and `~user` as homes wherever a path begins in it; names of no user are left.

    Shells do so only where `~` begins a word, so that `--data=~/birds` would be a folder called ~.
    """
    return _HOME.sub(lambda found: os.path.expanduser(found[0]), argument)  # noqa: PTH111 - Path refuses unknown users


def _let_others_work() -> None:
    """Have threads that wait for each other sleep soon; before anything is imported that starts them.

    By default OpenMP's threads spin for milliseconds while one of them waits for a core, on cores that others could
    use, and on a machine that is shared every parallel loop takes that long. A short spin costs nothing on an idle one
    (benchmarks/shared_machine.py). What the user has set stays.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = _SPINS


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the command as Ctrl-C does, undoing what is half done. A second acts at once."""

    changed: dict[signal.Signals, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in changed:
            signal.signal(each, signal.SIG_DFL)
        leaving.set()
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        usual_handlers = {
            signal.SIGINT: signal.default_int_handler,
            signal.SIGTERM: signal.SIG_DFL,
            signal.SIGHUP: signal.SIG_DFL,
        }
        for number, usual in usual_handlers.items():
            # A parent that had a signal ignored, as nohup does, wants it ignored.
            if signal.getsignal(number) is usual:
                changed[number] = usual
                signal.signal(number, interrupt)
    try:
        yield
    finally:
        leaving.clear()
        for number, handler in changed.items():
            signal.signal(number, handler)


def _take_debug(argv: list[str]) -> tuple[list[str], bool]:
    """Split `--debug` from the arguments, leaving alone whatever follows a bare `--`."""
    end = argv.index("--") if "--" in argv else len(argv)
    options, rest = argv[:end], argv[end:]
    return [argument for argument in options if argument != "--debug"] + rest, "--debug" in options


def _fail(message: str, debug: bool, code: int = EXIT_ERROR, prefix: str = "error") -> NoReturn:
    if debug:
        traceback.print_exc()
    # Messages name what is in files that somebody else may have made.
    print(f"{prefix}: {printable(message)}", file=sys.stderr)
    sys.exit(code)


def _interrupted(hint: str) -> NoReturn:
    print(f"interrupted: {hint}", file=sys.stderr)
    sys.exit(EXIT_ERROR)


def _describe_os_error(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _report_bug(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Replace Python's traceback of an unexpected exception by one line that says how to see it."""
    summary = printable(f"{kind.__name__}: {value}".replace("\n", " "))
    print(f"error: this is a bug: {summary}; run again with --debug for the traceback", file=sys.stderr)

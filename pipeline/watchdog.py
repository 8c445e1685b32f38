"""Work that hangs: noticed from outside, named, ended by killing its process, and left out by the next one.

A read from a dead file server, a decoder in a loop or a pass on a GPU that never returns cannot be interrupted from
within a process: its thread is in the system or in a library and may hold Python's own lock. So the command forks
before it does anything. The child works and says through a pipe what it begins and ends; the parent watches the clock,
kills the child, notes what it was at, and forks again.
"""

import contextlib
import ctypes
import functools
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cache_schema.errors import DitDistillError
from cache_schema.storage.files import directory_lock, make_directory, write_file

# Of a scan, a file may be left out; of a teacher's work, the batch. Anything else is needed, and can only be named.
Kind = Literal["scan", "teacher", "needed"]
_LOOK = 0.1  # seconds
_PR_SET_PDEATHSIG = 1
_KILLED_WITHIN = 30.0
_MOST_NOTES = 64 << 20


class HangError(DitDistillError):
    """Something hangs that cannot be left out, or cannot be killed; the message names it."""


@dataclass(frozen=True)
class WatchedWork:
    """What a process is at: samples by id, and where they are from; until: in seconds of `time.monotonic`."""

    kind: Kind
    what: str
    ids: list[str]
    sources: list[str]
    until: float = 0.0

    def __str__(self) -> str:
        shown = ", ".join(self.sources[:4]) + (f" and {len(self.sources) - 4} more" if len(self.sources) > 4 else "")
        return f"{self.what}{': ' if shown else ''}{shown}"


class WorkInHand:
    """What a process says that it is at, each piece of which may take so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at: dict[int, WatchedWork] = {}

    def note(self, message: dict) -> None:
        """Take what `watched` says."""
        if "ends" in message:
            self._at.pop(message["ends"], None)
            return
        told = dict(message)
        number, until = told.pop("begins"), time.monotonic() + self._seconds * told.pop("patience")
        self._at[number] = WatchedWork(**told, until=until)

    def late(self) -> list[WatchedWork]:
        """What takes longer than it may."""
        now = time.monotonic()
        return [work for work in self._at.values() if now > work.until]


# To whom this process says what it is at; None where nobody listens.
_listener: Callable[[dict], object] | None = None
_count = 0
_lock = threading.Lock()


@contextlib.contextmanager
def watched(kind: Kind, what: str, ids: Sequence[str], sources: Sequence[str], patience: int = 1) -> Iterator[None]:
    """Do a piece of work under the eyes of `under_watch`, or of whoever was told to `listen`, if anybody watches.

    what: in words. patience: how many times as long as usual it may take, where something is loaded first.
    """
    global _count
    say = _listener
    if say is None:
        yield
        return
    with _lock:
        _count += 1
        number = _count
    say({"begins": number, "kind": kind, "what": what, "ids": [*ids], "sources": [*sources], "patience": patience})
    try:
        yield
    finally:
        say({"ends": number})


def listen(listener: Callable[[dict], object]) -> None:
    """Have said to `listener` what this process begins and ends, before it goes on."""
    global _listener
    _listener = listener


def _write(descriptor: int, message: dict) -> None:
    data = json.dumps(message).encode() + b"\n"
    with _lock, contextlib.suppress(BrokenPipeError):
        while data:
            data = data[os.write(descriptor, data) :]


def notes_of(output: Path) -> Path:
    """Where is noted what hung while a cache was built at `output`: beside it."""
    return output.absolute().parent / f"{output.name}.hung.json"


def known_hangs(output: Path, kind: Kind) -> dict[str, str]:
    """What hung before, by sample: id → why it is left out. Raises HangError for notes that are none."""
    notes = notes_of(output)
    try:
        entries = json.loads(notes.read_bytes()[:_MOST_NOTES])["hung"]
        return {str(id): str(entry["reason"]) for entry in entries if entry["kind"] == kind for id in entry["ids"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        raise HangError(f"{notes} does not say what hung; remove it, and what hangs is found again") from None


def _note(output: Path, work: WatchedWork, reason: str) -> None:
    path = notes_of(output)
    make_directory(path.parent)
    with directory_lock(path.parent):  # several machines may build one cache
        entries = json.loads(path.read_bytes())["hung"] if path.exists() else []
        entries.append({"kind": work.kind, "ids": work.ids, "sources": work.sources, "reason": reason})
        write_file(path, (json.dumps({"hung": entries}, indent=1) + "\n").encode())


def leave_out(output: Path, work: WatchedWork, seconds: float) -> str:
    """Note beside `output` that something hung, so that it is left out from now on; returns what to say of it.

    Raises HangError for what cannot be left out.
    """
    if not work.ids or work.kind == "needed":
        raise HangError(f"{work} took longer than --batch-timeout {seconds:g} s, and cannot be left out")
    _note(output, work, f"{work.what} took longer than {seconds:g} s")
    return f"left out, as it took longer than --batch-timeout {seconds:g} s: {work}; noted in {notes_of(output)}"


def under_watch(seconds: float, output: Path) -> None:
    """Go on in a child that may take so many seconds for each piece of `watched` work; returns in the child alone.

    Where one takes longer, the child is killed, what it was at is noted beside `output`, and another child starts
    over. The parent leaves by SystemExit, with the code of the child that came to an end. Raises HangError, in the
    parent, for what cannot be left out.
    """
    while True:
        events, listener = os.pipe()
        held, holder = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent, child = os.getpid(), os.fork()
        if child == 0:
            _die_with(parent)
            os.close(events)
            os.close(holder)
            _begin_child(listener, held)
            return
        os.close(listener)
        os.close(held)
        try:
            hung = _watch(child, events, seconds)
        except KeyboardInterrupt:
            os.close(holder)
            raise SystemExit(_exit_code(os.waitpid(child, 0)[1])) from None
        finally:
            os.close(events)
        with contextlib.suppress(OSError):
            os.close(holder)
        if isinstance(hung, int):
            raise SystemExit(_exit_code(hung))
        _kill(child, hung[0])
        print(file=sys.stderr)  # its progress bar stands there still
        for work in hung:
            print(leave_out(output, work, seconds), file=sys.stderr)


def _die_with(parent: int) -> None:
    """Have the system kill this process with its parent: one that hangs does not hear of it in any other way."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _begin_child(listener: int, held: int) -> None:
    global _count
    _count = 0
    listen(functools.partial(_write, listener))
    threading.Thread(target=end_with, args=(held,), daemon=True).start()


def end_with(descriptor: int) -> None:
    """Interrupt this process, as SIGTERM does, once whoever has the other end of a pipe is gone or closes it."""
    while os.read(descriptor, 1):
        pass
    # The default action is set again once an interruption is under way; a second one would cut it short.
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGTERM)


def _watch(child: int, events: int, seconds: float) -> list[WatchedWork] | int:
    """Wait until a child ended, and return its status, or until it hangs, and return what it hangs at."""
    at = WorkInHand(seconds)
    rest = b""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if late := at.late():
            return late
        if not select.select([events], [], [], _LOOK)[0]:
            continue
        *lines, rest = (rest + os.read(events, 1 << 16)).split(b"\n")
        for line in lines:
            at.note(json.loads(line))
        if not lines and not rest:
            time.sleep(_LOOK)  # closed: it is about to end


def _kill(child: int, work: WatchedWork) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    until = time.monotonic() + _KILLED_WITHIN
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > until:
            raise HangError(
                f"{work} hangs inside the system, where even SIGKILL does not reach process {child}; look at the disk "
                "or the GPU that it waits for"
            )
        time.sleep(_LOOK)


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    raise DitDistillError(
        f"the build was ended by {signal.Signals(-code).name}, as a machine short of memory does; run the same command "
        "again: it resumes"
    )

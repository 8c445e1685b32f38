"""Asking again: what a network loses is asked for again, ever more slowly, until a deadline."""

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from cache_schema.errors import CacheRequestError, CacheUnreachable
from cache_schema.interrupts import leaving

T = TypeVar("T")

# Of one request with all its repetitions, in seconds. A command that somebody waits for says soon what is the matter;
# a run that streams outlives a server that is started again, which answers within a minute or two.
DEADLINE = 30.0
STREAMING_DEADLINE = 180.0
VARIABLE = "DIT_CACHE_TIMEOUT"  # instead of both
_FIRST_DEADLINE = 15.0
_LONGEST_STALL = 30.0
_FIRST_WAIT = 0.1
_LONGEST_WAIT = 5.0
# What a server asks for is not held against the deadline, up to this: hubs count requests by windows of five minutes.
_LONGEST_ASKED = 900.0


class Transient(Exception):  # noqa: N818 -- reads as what happened
    """A request failed in a way that may pass: a cut connection, a server that is busy or restarting.

    wait: for how many seconds the server asked to be left alone; 0 where it did not.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def patience(usual: float = DEADLINE) -> float:
    """Return for how many seconds a request is repeated here: those of the environment, or else the usual ones.

    Raises CacheRequestError where the environment holds no number of seconds.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return usual
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise CacheRequestError(f"{VARIABLE}={text}: give a number of seconds, for example 30")
    return seconds


def stall() -> float:
    """Return for how many seconds a connection may be silent before it counts as lost."""
    return min(_LONGEST_STALL, patience())


@dataclass(frozen=True)
class Retrying:
    """How long one request is repeated, in seconds, and how it is waited for in between."""

    deadline: float = field(default_factory=patience)
    sleep: Callable[[float], object] = leaving.wait

    def until_first_answer(self) -> "Retrying":
        """Return how a place is waited for that has never answered yet."""
        return replace(self, deadline=min(self.deadline, _FIRST_DEADLINE))

    def call(self, where: str, ask: Callable[[], T]) -> T:
        """Return what `ask` returns; raises CacheUnreachable where it was Transient until the deadline."""
        started, wait, asked = time.monotonic(), _FIRST_WAIT, 0.0
        while True:
            try:
                return ask()
            except Transient as error:
                if 0 < error.wait <= _LONGEST_ASKED - asked and not leaving.is_set():
                    asked, begun = asked + error.wait, time.monotonic()
                    self.sleep(error.wait)
                    started += time.monotonic() - begun
                    continue
                spent = time.monotonic() - started
                if spent + wait > self.deadline or leaving.is_set():
                    raise CacheUnreachable(
                        f"{where} cannot be reached: {error} (asked for {spent:.0f} s); check the connection and run "
                        "the same command again: finished work is kept"
                    ) from error
            # With jitter, so that the workers of a run do not come back all at once.
            self.sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT)

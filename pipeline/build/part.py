"""The part of a build that one process does: every n-th shard, until a time. Claims share what is in its part."""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from cache_schema.errors import DitDistillError

# Of sysexits.h, EX_TEMPFAIL: schedulers and scripts know it as "try again".
EXIT_STOPPED_EARLY = 75


class StoppedEarly(DitDistillError):  # noqa: N818 - says what happened
    """The time given was up before the work was done; the message says what is left."""

    exit_code = EXIT_STOPPED_EARLY
    prefix = "stopped early"


class PartError(DitDistillError):
    """A part of a build, or a time, that cannot be understood."""


class Choice(Protocol):
    """Which of the shards of a cache are built here."""

    def of(self, shards: Iterable[int]) -> list[int]: ...


@dataclass(frozen=True)
class ShardSlice:
    """Of every `count` shards the one at `index`, counted from 0: what one job of an array does."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, shards: Iterable[int]) -> list[int]:
        """Those of the shards that are in this slice."""
        return [shard for shard in shards if shard % self.count == self.index]


def read_slice(text: str) -> ShardSlice:
    """`i/n` with i from 0 to n − 1, as array jobs are numbered. Raises PartError."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if found is None or int(found[1]) >= int(found[2]):
        raise PartError(f"--shard-slice {text}: give i/n with i from 0 to n - 1, as 0/16 to 15/16")
    return ShardSlice(int(found[1]), int(found[2]))


def read_time(text: str, now: datetime | None = None) -> float:
    """Seconds since 1970 of 02:30 (the next one), 2026-11-26T02:30, or of such seconds themselves. Raises PartError."""
    text = text.strip()
    if re.fullmatch(r"[0-9]{6,12}", text):
        return float(text)
    here = now or datetime.now().astimezone()
    clock = re.fullmatch(r"([01]?[0-9]|2[0-3]):([0-5][0-9])", text)
    if clock:
        next_one = here.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
        return (next_one if next_one > here else next_one + timedelta(days=1)).timestamp()
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise PartError(
            f"--until {text}: give a time as 02:30, a date and time as 2026-11-26T02:30, or seconds since 1970"
        ) from None


@dataclass
class Deadline:
    """When to have finished, in seconds since 1970, and how fast the work goes; clock: the time now."""

    end: float
    clock: Callable[[], float] = time.time
    _rows: int = 0
    _seconds: float = 0.0
    _begun: float = field(init=False)

    def __post_init__(self) -> None:
        self._begun = self.clock()

    def note(self, rows: int, seconds: float) -> None:
        """Count rows that were computed in so many seconds."""
        self._rows += rows
        self._seconds += seconds

    def allows(self, rows: int) -> bool:
        """Whether a shard of so many rows can be finished: one as long may still be computed while it is claimed."""
        return self.clock() + 2 * self._expected(rows) < self.end

    def check(self, rows: int) -> None:
        """Raise StoppedEarly once it is over, PartError if a shard of so many rows will not fit another time either."""
        if self.clock() < self.end:
            return
        given, needed = self.end - self._begun, self._expected(rows)
        if self._rows < rows and needed > given > 0:
            raise PartError(
                f"a shard of {rows} samples takes {_minutes(needed)} here, and {_minutes(given)} were given: nothing "
                "would ever be finished; give more time, or begin a cache with fewer --samples-per-shard"
            )
        raise StoppedEarly("the time given is over; run the same command again")

    def _expected(self, rows: int) -> float:
        """Seconds that so many rows take, as those before did; 0 before the first."""
        return rows * self._seconds / self._rows if self._rows else 0.0


@dataclass(frozen=True)
class Part:
    """Which shards a process builds, and until when; by default all of them, with whoever else builds the cache."""

    shards: Choice | None = None
    deadline: Deadline | None = None

    @property
    def waits(self) -> bool:
        """Whether it waits at the end for what others have claimed, to take over what they give up."""
        return self.shards is None and self.deadline is None

    def of(self, shards: Iterable[int]) -> list[int]:
        """Those of the shards that are in this part."""
        return list(shards) if self.shards is None else self.shards.of(shards)

    def check(self, rows: int) -> None:
        """Raise as `Deadline.check` for shards of so many rows."""
        if self.deadline is not None:
            self.deadline.check(rows)

    def in_time(self, shards: Iterator[int], rows: int) -> Iterator[int]:
        """Take shards, of so many rows each, from an iterator that claims them, as long as they can be finished."""
        while self.deadline is None or self.deadline.allows(rows):
            try:
                yield next(shards)
            except StopIteration:
                return

    def note(self, rows: int, seconds: float) -> None:
        """Count rows that were computed in so many seconds."""
        if self.deadline is not None:
            self.deadline.note(rows, seconds)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"


WHOLE = Part()

"""How fast a run goes, and how much of its time the device waits for batches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from trainer.data.feed import Feed


@dataclass(frozen=True)
class Timing:
    """Updates with the seconds that they took, and how many of these the device waited for a batch."""

    updates: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.updates + other.updates, self.seconds + other.seconds, self.waited + other.waited)

    def __sub__(self, other: Timing) -> Timing:
        return Timing(self.updates - other.updates, self.seconds - other.seconds, self.waited - other.waited)

    def rates(self, rows: int) -> dict[str, float]:
        """Images per second, of `rows` in an update, and the share of the time that was waited; for the log."""
        seconds = max(self.seconds, 1e-9)
        share = min(1.0, max(0.0, self.waited / seconds))
        return {"images_per_second": self.updates * rows / seconds, "data_wait": round(share, 4)}


class Pace:
    """The clock of a run's updates, which stands still before the first of them and while scores are measured.

    What a device has been given it may not have done yet: the clock is right where somebody has just waited for it.
    """

    def __init__(self, feed: Feed, before: Timing):
        self._feed, self._before = feed, before
        self._updates, self._seconds, self._since = 0, 0.0, None  # type: tuple[int, float, float | None]
        self._lap = Timing()

    def begin(self) -> None:
        """An update begins: the clock goes from the first one on."""
        if self._since is None:
            self._since = time.monotonic()

    def end(self) -> None:
        """An update is done."""
        self._updates += 1

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Something else than training is done."""
        self._seconds, self._since = self._elapsed(), None
        yield
        self.begin()

    def lap(self) -> Timing:
        """Since this was last asked."""
        now = self._own()
        lap, self._lap = now - self._lap, now
        return lap

    @property
    def whole(self) -> Timing:
        """Since the run began, with what it did before it was interrupted."""
        return self._before + self._own()

    def _own(self) -> Timing:
        return Timing(self._updates, self._elapsed(), self._feed.waited)

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

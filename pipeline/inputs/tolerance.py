"""How many bad samples a build accepts before it stops."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cache_schema.errors import DitDistillError

_SHOWN = 5


class TooManyBadSamples(DitDistillError):  # noqa: N818 - says what happened, as the errors of cache_schema do
    """More samples are bad than the build tolerates; the message names some of them and why."""


@dataclass(frozen=True)
class Tolerance:
    """max_bad: the largest share of bad samples, 0 to 1, that is left out; strict: not even one is."""

    max_bad: float = 0.01
    strict: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise DitDistillError(f"--max-bad must lie from 0 to 1, not {self.max_bad}")


@dataclass
class BadSamples:
    """Counts the bad ones among `total` samples: files set aside by the scan, and those the teacher fails on."""

    tolerance: Tolerance
    total: int
    log: Callable[[str], None] = print
    count: int = 0
    _shown: list[str] = field(default_factory=list)

    def add(self, source: str, reason: str) -> None:
        """Count one; raises TooManyBadSamples at once where not even one is tolerated."""
        if self.tolerance.strict:
            raise TooManyBadSamples(f"--strict: {source}: {reason}; mend or remove it, or build without --strict")
        self.count += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(f"{source}: {reason}")
            self.log(f"left out {source}: {reason}")

    def recount(self, count: int) -> None:
        """Set the count to what is recorded, of which earlier runs and other builders have their share."""
        self.count = count

    def check(self) -> None:
        """Raise TooManyBadSamples if there are more than is tolerated."""
        share = 0.0 if self.tolerance.strict else self.tolerance.max_bad
        if self.count <= share * self.total:
            return
        more = self.count - len(self._shown)
        listed = "; ".join([*self._shown, *([f"and {more} more"] if more else [])])
        if not self._shown:
            listed = "`dit-cache info` lists them"
        limit = "which --strict forbids" if self.tolerance.strict else f"more than --max-bad {100 * share:g}%"
        raise TooManyBadSamples(
            f"{self.count} of {self.total} samples are bad, {limit}: {listed}; mend them, or allow more with --max-bad"
        )

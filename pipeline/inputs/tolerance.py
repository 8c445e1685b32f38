"""How many bad samples a build accepts before it stops."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from cache_schema.errors import DitDistillError
from cache_schema.fields import Setting, check_limits

_SHOWN = 5


class TooManyBadSamples(DitDistillError):  # noqa: N818 - says what happened, as the errors of cache_schema do
    """More samples are bad than the build tolerates; the message names some of them and why."""


def read_share(text: str) -> float:
    """1% or 0.01 as a share. Raises ValueError."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{text!r} is not a share like 1% or 0.01") from None


@dataclass(frozen=True)
class Tolerance:
    """max_bad: the largest share of bad samples that is left out; strict: not even one is."""

    max_bad: Annotated[
        float,
        Setting("Stop above this share of bad samples: 1% or 0.01.", least=0, most=1, reads=read_share, shown="1%"),
    ] = 0.01
    strict: Annotated[bool, Setting("Stop at the first bad image, caption or feature.")] = False

    def __post_init__(self) -> None:
        check_limits(self)


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

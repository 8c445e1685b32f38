"""What can go wrong with a cache, in words meant for the person at the keyboard.

Every class here is a *user-facing* error: its message is one clear line that says what is wrong, where, and what to
do about it. A programming mistake raises an ordinary Python exception instead. No command is named here: what the one
in use has for such a case, `cache_schema.advice` says from the facts that an error carries.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any

# ruff: noqa: N818 -- the names below are part of the public contract and read as what happened.


# Control, format (bidirectional overrides) and surrogate characters, and the separators that some terminals break at.
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_MAX_PRINTED = 2000


def printable(text: str) -> str:
    """Return text that somebody else may have chosen as one line that says nothing to a terminal but its letters."""
    if len(text) > _MAX_PRINTED:
        text = f"{text[: _MAX_PRINTED - 3]}..."
    return "".join(
        letter.encode("unicode_escape").decode("ascii") if unicodedata.category(letter) in _UNPRINTABLE else letter
        for letter in text
    )


class DitDistillError(Exception):
    """The base of every error that a command reports in one line, without a traceback.

    exit_code: what the command ends with; prefix: what the line begins with.
    """

    exit_code = 1
    prefix = "error"


class CacheError(DitDistillError):
    """Something is wrong with a cache: the `problem` and, where Python has one, after it a remedy.

    `facts` become attributes; each class says which it may have, None where one is not known.
    """

    def __init__(self, problem: object = "", *, remedy: str = "", **facts: Any) -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else str(problem))
        self.problem = str(problem)
        for name, value in facts.items():
            setattr(self, name, value)


class CacheNotFound(CacheError):
    """There is no cache at the given place."""


class CacheUnsealed(CacheError):
    """The cache, or the part asked for, is not complete yet; of a whole one, how many samples are missing."""

    missing_samples: int | None = None


class CacheCorrupt(CacheError):
    """A file of the cache does not contain what its journal or its format promises.

    `cache` says where the cache is whose build can mend it, `shard`, `row` and `sample` (its id) what of it is damaged;
    `copied` whether that was found while the cache was copied.
    """

    cache: str | None = None
    shard: int | None = None
    row: int | None = None
    sample: str | None = None
    copied: bool = False


class CacheExists(CacheError):
    """The cache to be built has been built already, elsewhere."""


class CacheMismatch(CacheError):
    """The cache at this place was made from other inputs than those given."""


class UnsupportedSchema(CacheError):
    """The cache has a schema version that this release cannot read."""


class CacheRequestError(CacheError):
    """The cache is fine but does not hold what was asked for (row, tap, timestep, view, buffer).

    `timesteps` are all that it would have to hold, where one of them is lacking.
    """

    timesteps: Sequence[int] | None = None


class InvalidFeatures(CacheError):
    """Features that may not be stored: not finite, of the wrong shape, or out of the encoding's range."""


class InvalidEncoding(CacheError):
    """An encoding that does not fit the features it is meant for."""


class LowFidelity(CacheError):
    """The encoding loses more than was allowed."""


class CacheStorageError(CacheError):
    """The operating system refused to write: no space left, no permission, a read-only file system."""


class CacheUnreachable(CacheError):
    """The machine that holds the cache does not answer, or refuses the credentials; nothing is known to be damaged."""


class LoaderError(DitDistillError):
    """A loader cannot go on: a worker process died, or memory could not be page-locked."""

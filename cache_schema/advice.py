"""What a command says to do about an error: the options and commands that answer the facts which the error carries."""

import shlex

from cache_schema.errors import CacheCorrupt, CacheRequestError, CacheUnsealed, DitDistillError


def mending_command(cache: object) -> str:
    """Return the command that mends the cache at a place, to be given with the options the cache was built with."""
    return f"dit-cache build --resume --repair --output {shlex.quote(str(cache))}"


def how_to_mend(cache: object) -> str:
    """Return the end of a line about damage to the cache at a place."""
    if "://" in str(cache):
        url = shlex.quote(str(cache))
        return f"remove it (`dit-cache rm {url} --yes`) and push a whole copy there again, or build it there anew"
    return f"mend it with `{mending_command(cache)}` and the build's other options"


def advised(error: DitDistillError) -> str:
    """Return the line about an error for who typed a command: what is wrong, and which command or option helps."""
    remedy = _remedy(error)
    return str(error) if remedy is None else f"{getattr(error, 'problem', error)}; {remedy}"


def _remedy(error: DitDistillError) -> str | None:
    if isinstance(error, CacheCorrupt) and error.cache is not None:
        if error.copied:
            return f"`dit-cache verify {shlex.quote(error.cache)}` lists all damage"
        return how_to_mend(error.cache)
    if isinstance(error, CacheUnsealed) and error.missing_samples is not None:
        return (
            "run the build again, it resumes, or read what is there with --allow-partial "
            "(in Python: allow_partial=True)"
        )
    if isinstance(error, CacheRequestError) and error.timesteps:
        return f"rebuild with --timesteps {','.join(map(str, error.timesteps))}"
    return None

"""Opening the cache that a command names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from cache_schema import Cache


def open_for(path: str, allow_partial: bool, verify: bool = True) -> Cache:
    """Open a cache; where it is not complete and that is accepted, say how much is missing."""
    from cache_schema import open_cache

    cache = open_cache(path, allow_partial=allow_partial, verify=verify)
    if not cache.manifest.sealed:
        missing, total = cache.missing_samples, cache.manifest.dataset.feature_rows
        note = f"note: cache {path} is not sealed: {missing} of {total} samples have no features yet"
        typer.echo(note, err=True)
    return cache

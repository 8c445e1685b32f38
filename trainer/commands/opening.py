"""Opening the cache that a command names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from cache_schema import Cache


def open_for(path: str, allow_partial: bool, verify: bool = True, local_cache: str | None = None) -> Cache:
    """Open a cache; where it is not complete and that is accepted, say how much is missing."""
    from cache_schema import open_cache

    cache = open_cache(path, allow_partial=allow_partial, verify=verify, local_cache=local_cache)
    if not cache.manifest.sealed:
        missing, total = cache.missing_samples, cache.manifest.dataset.feature_rows
        pulled = cache.manifest.provenance.pulled
        what = f"is a part ({pulled}): {missing} of {total} samples have no features here" if pulled else ""
        note = f"note: cache {path} {what or f'is not sealed: {missing} of {total} samples have no features yet'}"
        typer.echo(note, err=True)
    return cache

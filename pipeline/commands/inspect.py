"""`dit-cache info` and `dit-cache verify`: what a cache holds, and whether it is intact."""

import json
from typing import Annotated

import typer

from pipeline.commands.options import DebugOption


def info(
    cache: Annotated[str, typer.Argument(help="A cache, sealed or not: a folder or a URL.")],
    shards: Annotated[
        bool, typer.Option("--shards", help="Add a table of all shards: what is there, what is missing, how faithful.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the description as JSON, for scripts.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say what a cache holds, who built it with what, and how faithful its features are."""
    from cache_schema.care.describe import describe, describe_text

    if as_json:
        typer.echo(json.dumps(describe(cache, shards), indent=2))
    else:
        typer.echo(describe_text(cache, shards))


def verify(
    cache: Annotated[str, typer.Argument(help="A cache, sealed or not: a folder or a URL.")],
    debug: DebugOption = False,
) -> None:
    """Check every file against the checksums in the journal; exit code 1 if anything is wrong."""
    from pipeline.chain.steps import verify_cache

    verify_cache(cache)

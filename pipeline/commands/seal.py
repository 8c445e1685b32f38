"""`dit-cache seal`."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import DebugOption


def seal(
    cache: Annotated[Path, typer.Argument(help="A cache of which every shard is there.")],
    min_cosine: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Refuse a cache whose mean cosine to the teacher is below this, e.g. 0.995."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Declare a cache complete that jobs with --shard-slice have built; says which shards are missing if it is not."""
    from cache_schema.format.card import format_bytes
    from cache_schema.writing.creation import continue_cache
    from pipeline.build.provenance import provenance_of

    sealed = continue_cache(cache).seal(provenance_of(), min_cosine=min_cosine)
    typer.echo(
        f"sealed {cache}: {sealed.dataset.feature_rows} images with features, "
        f"{format_bytes(sealed.bytes_features)} of features, {format_bytes(sealed.bytes_images)} of student images"
    )

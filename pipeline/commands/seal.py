"""`dit-cache seal`."""

from contextlib import nullcontext
from typing import Annotated

import typer

from pipeline.commands.options import DebugOption


def seal(
    cache: Annotated[str, typer.Argument(help="A cache of which every shard is there: a folder, or s3, gs, az, sftp.")],
    min_cosine: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Refuse a cache whose mean cosine to the teacher is below this, e.g. 0.995."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Declare a cache complete that jobs with --shard-slice have built; says which shards are missing if it is not."""
    from cache_schema.format.card import format_bytes
    from cache_schema.sharing.spool import passing_folder
    from cache_schema.storage.local import local_folder
    from cache_schema.storage.places import is_remote
    from cache_schema.writing.creation import continue_cache
    from pipeline.build.provenance import provenance_of

    with passing_folder(cache) if is_remote(cache) else nullcontext(local_folder(cache)) as folder:
        sealed = continue_cache(folder).seal(provenance_of(), min_cosine=min_cosine)
    typer.echo(
        f"sealed {cache}: {sealed.dataset.feature_rows} images with features, "
        f"{format_bytes(sealed.bytes_features)} of features, {format_bytes(sealed.bytes_images)} of student images"
    )

"""`dit-cache preview`."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import DebugOption


def preview(
    cache: Annotated[str, typer.Argument(help="A cache (folder or URL); neither teacher nor data set are needed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture: .png, .jpg or .webp.")],
    sample: Annotated[list[str] | None, typer.Option(help="Id or row number of a sample; may be repeated.")] = None,
    random: Annotated[int | None, typer.Option(min=1, help="N samples drawn at random.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --random.")] = 0,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Show what is there of a cache that is not complete.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Draw samples: image, box, caption, and each tap's tokens as colours at every timestep, from noisy to clear."""
    if not sample and random is None:
        raise typer.BadParameter("name a sample, or give --random N", param_hint="--sample")
    from cache_schema import open_cache
    from pipeline.preview import run as work

    work.check_format(output)  # before anything is read
    opened = open_cache(cache, allow_partial=allow_partial)
    rows = work.find_rows(opened, sample or []) + (work.random_rows(opened, random, seed) if random else [])
    picture = work.preview(opened, list(dict.fromkeys(rows)), output)
    typer.echo(f"wrote {output}: {len(set(rows))} of {len(opened)} samples, {picture.width}×{picture.height} pixels")

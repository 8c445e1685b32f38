"""`dit-train embed`: images to a file of embeddings."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_schema.options import with_options
from cache_schema.settings import Values
from trainer.commands.opening import open_for, require_student_alone
from trainer.retrieval.config import EMBED, EmbedConfig

if TYPE_CHECKING:
    from trainer.retrieval.images import Images

_NAMED = 5


@with_options(EMBED, ["split", "device", "threads", "max_megapixels", "thumbnails"])
def embed(
    given: Values,
    source: Annotated[str, typer.Argument(help="Folder of images, or a cache (folder or URL), for its own images.")],
    model: Annotated[Path, typer.Option(help="Folder of a run or of an export, or a student.safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, e.g. embeddings.parquet.")],
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be read.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever the file holds.")] = False,
) -> None:
    """Embed all images of a folder or of a cache; the same command goes on where it stopped, and adds new ones."""
    config = EMBED.make({}, given)

    from trainer.retrieval.embed import embed_images
    from trainer.retrieval.model import open_model

    require_student_alone(model)
    opened = open_model(model, config.device)
    done = embed_images(_images(source, config, given), opened, output, overwrite, strict, config.thumbnails)
    for name, reason in list(done.failed.items())[:_NAMED]:
        typer.echo(f"note: left out {name}: {reason}", err=True)
    if len(done.failed) > _NAMED:
        typer.echo(f"note: left out {len(done.failed) - _NAMED} more, which the file names", err=True)
    rate = f", {done.fresh / done.seconds:.0f} images/s" if done.fresh else ""
    left = f", {len(done.failed)} left out" if done.failed else ""
    typer.echo(f"wrote {done.images} embeddings to {output} ({done.fresh} computed now{rate}{left})")
    typer.echo(
        f"next: {shlex.join(['dit-train', 'index', str(output), '--output', str(output.with_suffix('.index'))])}"
    )


def _images(source: str, config: EmbedConfig, given: Values) -> Images:
    """What is to be embedded; raises TrainError for an option that would do nothing there."""
    from trainer.errors import TrainError
    from trainer.retrieval.images import CacheImages, FolderImages, is_cache

    idle = ("threads", "max_megapixels") if is_cache(source) else ("split",)
    named = next((EMBED.field(name).option for name in idle if name in given), None)
    if named is not None:
        kind = "image files, and this is a cache" if is_cache(source) else "a cache, and this is a folder of images"
        raise TrainError(f"{named} is for {kind}")
    if is_cache(source):
        return CacheImages(source, open_for(source, allow_partial=True), config.split)
    return FolderImages(Path(source), config.max_megapixels, config.threads)

"""`dit-train serve`: a page to search with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cache_schema.options import with_options
from cache_schema.settings import Values
from trainer.commands.search import for_each
from trainer.retrieval.config import SERVE, ServeConfig

_MISSING = "serving needs packages that are not installed ({}): pip install 'dit-distill[serve]'"


@with_options(SERVE, ["host", "port", "top", "max_upload_mb", "max_megapixels", "upload_seconds", "device"])
def serve(
    given: Values,
    index: Annotated[list[Path], typer.Argument(help="Folders of indexes; several are shown side by side.")],
    model: Annotated[
        list[Path] | None, typer.Option(help="Where the student of each index is now, if it has moved.")
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="Where the images of each index are now, if they have moved.")
    ] = None,
) -> None:
    """Serve a page on this machine: drop an image, see the nearest ones by each student. Ctrl-C ends it."""
    config = SERVE.make({}, given)
    moved = for_each(index, model, "--model"), for_each(index, images, "--images")
    _serve(config, index, *moved)


def _serve(config: ServeConfig, folders: list[Path], models: list[Any], places: list[Any]) -> None:
    from trainer.errors import TrainError
    from trainer.retrieval.index import open_index

    try:
        from trainer.retrieval import serve as serving
    except ImportError as error:
        raise TrainError(_MISSING.format(error.name)) from None

    with serving.listen(config) as listening:  # first, for students take seconds to load
        served = []
        for folder, model, place in zip(folders, models, places, strict=True):
            index = open_index(folder)
            images = index.images(place)
            served.append(serving.Served(index, index.model(model, config.device), images))
            typer.echo(f"{folder}: {len(index):,} images by {index.label}")
        app = serving.make_app(served, config)
        if not serving.is_loopback(config.host):
            typer.echo(
                f"note: whoever reaches {config.host} can search and see the images; nobody is asked who they are",
                err=True,
            )
        typer.echo(f"serving at {serving.address_of(listening)}; Ctrl-C ends it")
        try:
            serving.make_server(app).run(sockets=[listening])
        except KeyboardInterrupt:  # as uvicorn leaves, when it has finished
            typer.echo("stopped")

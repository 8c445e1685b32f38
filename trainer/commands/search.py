"""`dit-train search`: the images nearest to one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cache_schema.options import with_options
from cache_schema.settings import Values
from trainer.retrieval.config import SEARCH, SearchConfig


@with_options(SEARCH, ["top", "min_similarity", "device"])
def search(
    given: Values,
    index: Annotated[list[Path], typer.Option(help="Folder of an index; repeatable, to compare students.")],
    query: Annotated[Path | None, typer.Argument(help="A picture to search with.")] = None,
    item: Annotated[str | None, typer.Option(help="Instead of a picture: an indexed image, by its name.")] = None,
    model: Annotated[
        list[Path] | None, typer.Option(help="Where the student of each index is now, if it has moved.")
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="Where the images of each index are now, if they have moved.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also a page with the pictures.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also one picture of them all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Find the images nearest to a picture, by the student that made the index; several indexes side by side."""
    if (query is None) == (item is None):
        raise typer.BadParameter("give a picture to search with, or --item NAME", param_hint="QUERY")
    config = SEARCH.make({}, given)
    moved = for_each(index, model, "--model"), for_each(index, images, "--images")
    _search(config, index, query, item, moved, html, png, as_json)


def for_each(index: list[Path], given: list[Any] | None, option: str) -> list[Any]:
    """One value for each index; none at all is for where everything was."""
    if given and len(given) != len(index):
        raise typer.BadParameter(f"give it once for each --index, {len(index)} times", param_hint=option)
    return list(given) if given else [None] * len(index)


def _search(
    config: SearchConfig, folders: list[Path], query: Path | None, item: str | None,
    moved: tuple[list[Any], list[Any]], html: Path | None, png: Path | None, as_json: bool,
) -> None:  # fmt: skip
    from cache_schema.storage.files import storage_errors, write_file
    from trainer.retrieval import gallery
    from trainer.retrieval import search as searching
    from trainer.retrieval.index import open_index

    models, places = moved
    indexes = [open_index(folder) for folder in folders]
    limits = config.top, config.min_similarity
    if item is not None:
        found = [searching.search_item(item, each, *limits) for each in indexes]
    else:
        assert query is not None
        picture = searching.read_query(query)
        found = [
            searching.search_picture(picture, each, each.model(at, config.device), *limits)
            for each, at in zip(indexes, models, strict=True)
        ]
    name = item or str(query)
    values = searching.as_values(name, found)
    typer.echo(json.dumps(values, indent=2) if as_json else searching.as_text(name, found))
    if html is None and png is None:
        return
    images = [each.images(at) for each, at in zip(indexes, places, strict=True)]
    if item is not None:
        shown = gallery.Query(item, images[0].picture(item), indexes[0].classes[indexes[0].row_of(item)])
    else:
        shown = gallery.Query(query.name if query else "", picture)
    for file, render in ((html, _page), (png, gallery.render_png)):
        if file is not None:
            with storage_errors(file):
                write_file(file, render(shown, found, images))
            typer.echo(f"wrote {file}", err=as_json)


def _page(*shown: Any) -> bytes:
    from trainer.retrieval.gallery import render_html

    return render_html(*shown).encode()

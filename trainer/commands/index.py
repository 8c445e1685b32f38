"""`dit-train index`: embeddings to an index that is searched."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cache_schema.options import with_options
from cache_schema.settings import Values
from trainer.retrieval.config import INDEX


@with_options(INDEX, ["kind", "connectivity", "expansion_add", "expansion_search"])
def index(
    given: Values,
    embeddings: Annotated[Path, typer.Argument(help="File that dit-train embed wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the index.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an index that is there.")] = False,
) -> None:
    """Make embeddings searchable: exactly, or (extra `search`) by a graph that is walked."""
    config = INDEX.make({}, given)

    from trainer.retrieval.index import make_index

    made = make_index(embeddings, output, config, overwrite)
    graph = made.about.get("graph")
    how = f"hnsw, which finds {100 * graph['recall_at_10']:.1f} % of the true 10 nearest" if graph else "exact"
    typer.echo(f"wrote {output}: {len(made):,} images by {made.label}, {how}")
    typer.echo(f"next: {shlex.join(['dit-train', 'search', 'QUERY.jpg', '--index', str(output)])}")

"""`dit-cache convert`."""

from pathlib import Path
from typing import Annotated

import typer

from cache_schema.errors import printable
from cache_schema.format.vocabulary import Compression, StoreKind
from pipeline.commands.options import DebugOption


def convert(
    source: Annotated[str, typer.Argument(help="A sealed cache: a folder or a URL.")],
    target: Annotated[Path, typer.Argument(help="Folder of the copy; a conversion begun there is continued.")],
    store: Annotated[StoreKind, typer.Option(help="How the copy stores features.")],
    compression: Annotated[
        Compression | None, typer.Option(help="Lossless compression of a zarr copy; default that of the source.")
    ] = None,
    samples_per_shard: Annotated[int | None, typer.Option(min=1, help="Default: as many as in the source.")] = None,
    debug: DebugOption = False,
) -> None:
    """Copy a cache into another store without loss: the copy has the same cache id, features and images."""
    from tqdm import tqdm

    from cache_schema.care.convert import convert as copy
    from cache_schema.format.manifest_file import load_manifest
    from cache_schema.storage.places import folder_at

    total = load_manifest(folder_at(source)).dataset.feature_rows
    with tqdm(total=total, desc="convert", unit="sample", delay=1) as bar:
        sealed = copy(
            source,
            target,
            store,
            compression,
            samples_per_shard,
            bar.update,
        )
    size = f"{(sealed.bytes_features or 0) / 1e6:.1f} MB"
    typer.echo(printable(f"sealed {target}: {sealed.label} as {sealed.store.kind}, {size}"))

"""`dit-cache push`, `pull`, `ls`, `find`, `rm`, `gc`: caches between machines."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import DebugOption

PlaceArgument = Annotated[str | None, typer.Argument(help="A prefix with caches below it; default $DIT_CACHE_REMOTE.")]


def push(
    cache: Annotated[str, typer.Argument(help="A sealed cache, in a folder.")],
    url: Annotated[str | None, typer.Argument(help="Where it shall be; default $DIT_CACHE_REMOTE/NAME-ID.")] = None,
    sign: Annotated[Path | None, typer.Option(help="ed25519 private key to sign the cache with.")] = None,
    owner: Annotated[
        str | None, typer.Option(envvar="DIT_CACHE_OWNER", help="Whom ls names, to be asked about it.")
    ] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Replace another build's push that was given up half way.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent and changed, and stop.")] = False,
    debug: DebugOption = False,
) -> None:
    """Bring a cache to where others find it: s3, gs, az, hf, sftp or a folder.

    Interrupted, the same command goes on. It is visible there once it is
    whole. Paths, user and host names are taken out of its manifest first.
    """
    from cache_schema.errors import printable
    from cache_schema.format.card import format_bytes
    from cache_schema.format.licences import licence_of
    from cache_schema.format.manifest_file import load_manifest
    from cache_schema.sharing import push as work
    from cache_schema.sharing.catalogue import prefix_of
    from cache_schema.storage.local import local_folder

    place = url or f"{prefix_of(None)}/{load_manifest(local_folder(cache)).label}"
    plan = work.plan_push(cache, place, sign, owner)
    for change in plan.changes:
        typer.echo(printable(f"removed from the manifest: {change}"))
    typer.echo(printable(f"teacher's licence: {licence_of(plan.manifest.teacher)}"))
    if work.is_public(plan):
        typer.echo(printable(f"{place} is public: everybody may read the cache, which that licence must allow"))
    typer.echo(printable(f"{plan.manifest.label}, {format_bytes(plan.bytes_total)}, to {place}"))
    if dry_run:
        return
    with _bar("push", plan.bytes_total) as advance:
        there = work.push(plan, take_over, advance)
    if owner and owner != there.provenance.owner:
        typer.echo(printable(f"it is there already, owned by {there.provenance.owner or 'nobody'}: that stays so"))
    typer.echo(printable(f"pushed: `dit-cache pull {place} FOLDER`, or `dit-train run --cache {place}`"))


def pull(
    url: Annotated[str, typer.Argument(help="A cache: s3, gs, az, https, sftp, hf, or a folder.")],
    folder: Annotated[str, typer.Argument(help="Folder of the copy; a pull begun there is continued.")],
    split: Annotated[str | None, typer.Option(help="Only the samples of this split.")] = None,
    samples: Annotated[str | None, typer.Option(help="Only these rows, e.g. 0:1000.")] = None,
    taps: Annotated[str | None, typer.Option(help="Only these taps, e.g. hidden,single.3 (zarr store).")] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Only these timesteps, e.g. 22,28 (zarr store); less is fetched.")
    ] = None,
    images_only: Annotated[bool, typer.Option("--images-only", help="Student images without features.")] = False,
    require_signature: Annotated[
        Path | None, typer.Option(help="ed25519 public key: refuse a cache that its owner did not sign.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Copy a cache here, or a part of it; every file is held against its checksum.

    Parts are whole shards, so a few samples more may come along. A part
    says what it is one of, can be trained on, and grows by another pull.
    """
    from cache_schema.errors import printable
    from cache_schema.sharing import pull as work
    from cache_schema.sharing.parts import Selection, parse_samples_range, parse_timesteps

    rows = parse_samples_range(samples) if samples else None
    names = tuple(taps.split(",")) if taps else None
    steps = parse_timesteps(timesteps) if timesteps else None
    plan = work.plan_pull(url, folder, Selection(split, rows, names, images_only, steps), require_signature)
    with _bar("pull", work.bytes_of(plan)) as advance:
        manifest = work.pull(plan, advance)
    part = f"; a part: {manifest.provenance.pulled}" if manifest.provenance.pulled else ""
    typer.echo(printable(f"pulled {manifest.label} to {folder}{part}"))


def ls(
    place: PlaceArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    debug: DebugOption = False,
) -> None:
    """List the caches at a place: data set, teacher, curriculum, taps, encoding, size, owner, date, id."""
    _show(place, [], as_json)


def find(
    words: Annotated[list[str], typer.Argument(help="Each must apply: text, or COLUMN=TEXT such as teacher=klein.")],
    place: Annotated[str | None, typer.Option(help="A prefix; default $DIT_CACHE_REMOTE.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    debug: DebugOption = False,
) -> None:
    """List the caches at a place that all words apply to."""
    _show(place, words, as_json)


def rm(
    url: Annotated[str, typer.Argument(help="A cache, not a prefix with several.")],
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without, only show what would go.")] = False,
    debug: DebugOption = False,
) -> None:
    """Remove a cache from a place; without --yes it only says what that would be."""
    from cache_schema.errors import printable
    from cache_schema.sharing import catalogue

    if yes:
        typer.echo(f"removed {url}: {catalogue.remove(url)} files")
        return
    count = len(catalogue.removable(url))
    if entries := catalogue.catalogue(url):
        for line in catalogue.table(entries).splitlines():
            typer.echo(printable(line))
    typer.echo(f"{count} files would be removed; add --yes to remove them")


def gc(
    place: PlaceArgument = None,
    runs: Annotated[Path, typer.Option(help="Folder with the runs that count, at any depth.")] = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without, only show them.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show the caches at a place that no run in a folder refers to; with --yes remove them."""
    from cache_schema.errors import printable
    from cache_schema.sharing import catalogue

    if not runs.is_dir():
        raise typer.BadParameter(f"{runs} is no folder: every cache would look unused", param_hint="--runs")
    entries = catalogue.unused(catalogue.catalogue(catalogue.prefix_of(place)), runs)
    if not entries:
        typer.echo(f"every cache is used by a run in {runs}")
        return
    for line in catalogue.table(entries).splitlines():
        typer.echo(printable(line))
    for entry in entries if yes else ():
        typer.echo(printable(f"removed {entry.url}: {catalogue.remove(entry.url)} files"))
    if not yes:
        typer.echo(f"no run in {runs} refers to these; other people's runs are not seen. Add --yes to remove them")


def _show(place: str | None, words: list[str], as_json: bool) -> None:
    from cache_schema.errors import printable
    from cache_schema.sharing import catalogue

    prefix = catalogue.prefix_of(place)
    entries = list(catalogue.matching(catalogue.catalogue(prefix), words))
    if as_json:
        typer.echo(json.dumps([{**entry.row(), "url": entry.url} for entry in entries], indent=2))
    elif entries:
        for line in catalogue.table(entries).splitlines():
            typer.echo(printable(line))
    else:
        typer.echo(f"no {'such ' if words else ''}cache at {prefix}")


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=1) as bar:

        def advance(size: int) -> None:
            bar.update(size)

        yield advance

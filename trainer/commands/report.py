"""`dit-train report`: one page on a set of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.opening import open_for


def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.")],
    output: Annotated[Path, typer.Option(help="Where report.html and summary.json go.")],
    cache: Annotated[str | None, typer.Option(help="The runs' cache, if it has moved.")] = None,
    started: Annotated[
        float | None, typer.Option(help="Start of the whole job, seconds since 1970: `date +%s`.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept an unsealed cache.")] = False,
) -> None:
    """One HTML page and one JSON file on a set of runs: recalls, loss curves, a retrieval gallery."""
    from trainer.device import choose_device, use_device
    from trainer.reports import report as reports
    from trainer.runs import cache_of_run

    opened = open_for(cache or cache_of_run(runs[0]), allow_partial)
    where = choose_device(device)
    named = use_device(where)
    finished = reports.load_runs(runs, opened, where)
    reports.write_report(finished, opened, output, where, started)
    typer.echo(named)
    typer.echo(reports.format_runs(finished))
    typer.echo(f"wrote {output / 'report.html'} and {output / 'summary.json'}; next: open the page in a browser")

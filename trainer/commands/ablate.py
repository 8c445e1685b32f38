"""`dit-train ablate`: the method, its controls and sweeps on one cache, as a table with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.commands.opening import open_for
from trainer.runs import SplitName


def ablate(
    cache: Annotated[str, typer.Option(help="Teacher cache to train from.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs and the tables.")] = Path("runs/ablation"),
    variants: Annotated[
        str, typer.Option(help="Comma-separated; by default the method and all controls that the cache allows.")
    ] = "",
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE/VALUE",
            help="A setting of gcd, e.g. gim.queries=4/16/32, or k, n, stages, tap, alpha; repeatable.",
        ),
    ] = None,
    random_teacher: Annotated[
        str | None, typer.Option(help="Cache of the same images by a teacher of random weights, as a control.")
    ] = None,
    unrefined_teacher: Annotated[
        str | None, typer.Option(help="Cache of the same images by the teacher before Stage I: row ② of the paper.")
    ] = None,
    other_features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=CACHE",
            help="gcd with the features of another cache of the same images, say of another teacher; repeatable.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, … of every variant.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    preset: Annotated[str, typer.Option(help="Preset of every run, one of `dit-train run`.")] = "recommended",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="For every run whose method has the field; repeatable."),
    ] = None,
    split: Annotated[
        SplitName, typer.Option(help="test, or validation: with --set validation_classes=0.2; choose by that.")
    ] = "test",
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept an unsealed cache.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print the runs and stop.")] = False,
) -> None:
    """Compare the method with its controls: R@1 with intervals by bootstrap over classes, paired to the baseline.

    The same command goes on where an interrupted one stopped; finished runs are not made again.
    """
    from trainer.errors import TrainError
    from trainer.methods.settings import absolute
    from trainer.reports.ablation_plan import (
        check_other_caches,
        choose_variants,
        left_out,
        make_cells,
        target_folders,
        unlabelled_of,
    )

    cache, random_teacher = absolute(cache), random_teacher and absolute(random_teacher)
    names = [name for name in variants.split(",") if name]
    unrefined_teacher = unrefined_teacher and absolute(unrefined_teacher)
    opened = open_for(cache, allow_partial)
    taken = unlabelled_of(preset, settings or [])
    others = other_features or []
    chosen = choose_variants(opened, names, sweep or [], random_teacher, unrefined_teacher, split, others, taken)
    targets = target_folders(opened, chosen, output)
    cells = make_cells(cache, chosen, seeds, preset, settings or [], targets)
    for reason in left_out(opened, split, taken) if not names else ():
        typer.echo(f"note: left out: {reason}", err=True)
    if split == "validation" and not cells[0].config.validation_classes:
        raise TrainError("--split validation: no classes are held out; add --set validation_classes=0.2")
    check_other_caches(opened, cells, allow_partial)
    if plan:
        typer.echo("\n".join(cell.name for cell in cells))
        return

    from trainer.evaluation.tables import headline
    from trainer.reports.ablation_run import run_cells
    from trainer.reports.ablation_table import as_markdown, tabulate, write_tables
    from trainer.reports.control_targets import make_target

    for kind, folder in targets.items():
        make_target(opened, kind, folder)

    done = []
    try:
        for scored in run_cells(cells, output, split, jobs, allow_partial):
            done.append(scored)
            recall = 100 * headline(scored.scores)["recall_at_1"]
            typer.echo(f"{len(done)} of {len(cells)}: {scored.cell.name}: R@1 {recall:.1f} %")
            files = write_tables(tabulate(done, chosen), output)  # what there is so far, too
    except KeyboardInterrupt:
        typer.echo(f"note: what is finished stays in {output}; the same command goes on from there", err=True)
        raise
    typer.echo(as_markdown(tabulate(done, chosen)))
    typer.echo(f"the tables are in {', '.join(map(str, files))}")

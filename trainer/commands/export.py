"""`dit-train export`: a trained student as others load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.commands.opening import open_for, require_student_alone

if TYPE_CHECKING:
    from cache_schema import Cache
    from trainer.export.reduced import Bits

MUCH = 0.02  # of R@1, lost by fewer bits


def export(
    run: Annotated[Path, typer.Argument(help="Directory of a finished run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the export.")],
    cache: Annotated[
        str | None, typer.Option(help="The run's cache, if it has moved: for the card, and how images are kept.")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx/--no-onnx", help="Also write model.onnx, checked in onnxruntime.")
    ] = True,
    fp16: Annotated[bool, typer.Option("--fp16", help="Also model.fp16.onnx, with its scores on the card.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also model.int8.onnx, with ranges from training images, and its scores.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an export that is there.")] = False,
) -> None:
    """The student alone, as timm, the hub and onnxruntime load it, with a model card; loads no teacher."""
    from trainer.export.export import export_run

    require_student_alone(run)
    chosen: dict[Bits, bool] = {"fp16": fp16, "int8": int8}
    bits = [each for each, wanted in chosen.items() if wanted]
    names = export_run(run, output, _cache_at_hand(run, cache), onnx, overwrite, bits)
    typer.echo(f"wrote {', '.join(names)} to {output}")
    say_scores(output)
    typer.echo(f'next: timm.create_model("local-dir:{output}", pretrained=True)')


def say_scores(output: Path) -> None:
    """What the forms in fewer bits score on the test split, and where one loses more than a little, that it does."""
    from trainer.models.opening import ABOUT, CONFIG
    from trainer.runs import read_json

    whole, *forms = read_json(output / CONFIG)[ABOUT]["onnx"] or [None]
    for form in forms:
        score, lost = form["scores"]["recall_at_1"], whole["scores"]["recall_at_1"] - form["scores"]["recall_at_1"]
        typer.echo(
            f"{form['name']}: R@1 {100 * score:.1f} %, {100 * lost:.1f} points less than {whole['name']}; "
            f"{form['megabytes']:.1f} MB instead of {whole['megabytes']:.1f}"
        )
        if lost > MUCH:
            typer.echo(f"note: {form['name']} is clearly worse than {whole['name']}: use that one", err=True)


def _cache_at_hand(run: Path, named: str | None) -> Cache | None:
    """The cache that a run was trained from; where it is gone and none is named, only say so."""
    from cache_schema.errors import CacheError
    from trainer.runs import cache_of_run, load_result

    load_result(run)  # says so if the run is not finished
    if named is not None:
        return open_for(named, allow_partial=True, verify=False)
    try:
        return open_for(cache_of_run(run), allow_partial=True, verify=False)
    except (CacheError, OSError) as error:
        typer.echo(f"note: the card says nothing of data and teacher ({error}); --cache names the cache", err=True)
        return None

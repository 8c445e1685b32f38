"""`dit-cache annotate`."""

from pathlib import Path
from typing import Annotated

import typer

from cache_schema.settings import Values
from pipeline.commands.options import ANNOTATIONS, DATASET, IMAGES, LIMIT, DebugOption, configured_by
from pipeline.config import configure
from pipeline.presets import run_folder


@configured_by(
    DATASET, *IMAGES, ANNOTATIONS, LIMIT,
    "annotate.boxes", "annotate.detector", "annotate.detector_revision", "annotate.box_threshold", "annotate.padding",
    "annotate.captions", "annotate.captioner", "annotate.captioner_revision", "annotate.instruction",
    "annotate.max_new_tokens", "annotate.crop_side", "annotate.batch", "annotate.save_every", "annotate.dtype",
    "annotate.device",
)  # fmt: skip
def annotate(
    given: Values,
    output: Annotated[
        Path | None, typer.Option(help="The Parquet file; default runs/<dataset>/annotations.parquet.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Also draw a picture sheet (PNG) of boxes and captions.")] = None,
    sheet_images: Annotated[int, typer.Option(min=1, help="Images on the picture sheet.")] = 24,
    debug: DebugOption = False,
) -> None:
    """Find the object in every image and describe it without naming its class; writes one Parquet file.

    The same command goes on where an interrupted run stopped. Give the file to refine, probe and
    build with --annotations.
    """
    from pipeline.chain.steps import annotate_images

    config = configure(given)
    place = output or run_folder(config.data.name) / "annotations.parquet"
    annotate_images(config, place, sheet=sheet, sheet_images=sheet_images)

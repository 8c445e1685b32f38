"""`dit-cache annotate`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.options import (
    AnnotationsOption,
    DataOption,
    DatasetOption,
    DebugOption,
    DeviceOption,
    Dtype,
    LimitOption,
    SuperclassOption,
    TrainClassesOption,
    TrainRatioOption,
    parse_classes,
)
from pipeline.presets import run_folder


class Boxes(StrEnum):
    detector = "detector"
    dataset = "dataset"
    full = "full"


class Captions(StrEnum):
    vlm = "vlm"
    dataset = "dataset"
    none = "none"


def annotate(
    dataset: DatasetOption = "demo",
    data: DataOption = None,
    train_classes: TrainClassesOption = None,
    train_ratio: TrainRatioOption = None,
    superclass: SuperclassOption = None,
    annotations: AnnotationsOption = None,
    output: Annotated[
        Path | None, typer.Option(help="The Parquet file; default runs/<dataset>/annotations.parquet.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="Also draw a picture sheet (PNG) of boxes and captions.")] = None,
    sheet_images: Annotated[int, typer.Option(min=1, help="Images on the picture sheet.")] = 24,
    boxes: Annotated[
        Boxes | None,
        typer.Option(
            help="Where boxes come from: a detector, the data set, or the whole image is the box. Default detector, "
            "but dataset for the demo."
        ),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(
            help="Zero-shot detector: hub repository or folder.", show_default="IDEA-Research/grounding-dino-base"
        ),
    ] = None,
    detector_revision: Annotated[str | None, typer.Option(help="Revision of the detector's repository.")] = None,
    box_threshold: Annotated[
        float | None, typer.Option(help="A detection's score must be above this.", show_default="0.3")
    ] = None,
    padding: Annotated[
        float | None, typer.Option(help="Share of a detected box's sides to add around it.", show_default="0.05")
    ] = None,
    captions: Annotated[
        Captions | None,
        typer.Option(
            help="Where captions come from: a vision-language model, the data set, or none. Default vlm, but dataset "
            "for the demo."
        ),
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="Image-text-to-text chat model: hub repository or folder.", show_default="Qwen/Qwen2.5-VL-7B-Instruct"
        ),
    ] = None,
    captioner_revision: Annotated[str | None, typer.Option(help="Revision of the captioner's repository.")] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="What the captioner is told; {superclass} stands for the data set's word. Default: describe its "
            "features, do not name its class.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest caption, in tokens of the captioner.", show_default="96")
    ] = None,
    crop_side: Annotated[
        int | None,
        typer.Option(
            help="Longer side, in pixels, of the crop that the captioner sees; larger ones shrink.", show_default="768"
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per forward pass.", show_default="8")] = None,
    save_every: Annotated[
        int | None,
        typer.Option(help="Images after which an interrupted run need not do them again.", show_default="64"),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Precision of the captioner; auto is bfloat16 on a GPU. The detector runs in float32.",
            show_default="auto",
        ),
    ] = None,
    device: DeviceOption = None,
    limit: LimitOption = None,
    debug: DebugOption = False,
) -> None:
    """Find the object in every image and describe it without naming its class; writes one Parquet file.

    The same command goes on where an interrupted run stopped. Give the file to refine, probe and
    build with --annotations.
    """
    from pipeline.chain.steps import annotate_images
    from pipeline.config import make_config

    config = make_config(
        dataset,
        data__root=data, data__limit=limit, data__train_classes=parse_classes(train_classes),
        data__train_ratio=train_ratio, data__superclass=superclass, data__annotations=annotations,
        annotate__boxes=boxes, annotate__detector=detector, annotate__detector_revision=detector_revision,
        annotate__box_threshold=box_threshold, annotate__padding=padding,
        annotate__captions=captions, annotate__captioner=captioner, annotate__captioner_revision=captioner_revision,
        annotate__instruction=instruction, annotate__max_new_tokens=max_new_tokens, annotate__crop_side=crop_side,
        annotate__batch=batch, annotate__save_every=save_every, annotate__dtype=dtype, annotate__device=device,
    )  # fmt: skip
    place = output or run_folder(dataset) / "annotations.parquet"
    annotate_images(config, place, sheet=sheet, sheet_images=sheet_images)

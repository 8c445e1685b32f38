"""`dit-cache annotate`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.options import (
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
    choose_device,
    choose_dtype,
    open_data,
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
        Boxes, typer.Option(help="Where boxes come from: a detector, the data set, or the whole image is the box.")
    ] = Boxes.detector,
    detector: Annotated[
        str | None,
        typer.Option(
            help="Zero-shot detector: hub repository or folder; default IDEA-Research/grounding-dino-base.",
            show_default=False,
        ),
    ] = None,
    detector_revision: Annotated[str | None, typer.Option(help="Revision of the detector's repository.")] = None,
    box_threshold: Annotated[float, typer.Option(help="A detection's score must be above this.")] = 0.3,
    padding: Annotated[float, typer.Option(help="Share of a detected box's sides to add around it.")] = 0.05,
    captions: Annotated[
        Captions, typer.Option(help="Where captions come from: a vision-language model, the data set, or none.")
    ] = Captions.vlm,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="Image-text-to-text chat model: hub repository or folder; default Qwen/Qwen2.5-VL-7B-Instruct.",
            show_default=False,
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
    max_new_tokens: Annotated[int, typer.Option(help="Longest caption, in tokens of the captioner.")] = 96,
    crop_side: Annotated[
        int, typer.Option(help="Longer side, in pixels, of the crop that the captioner sees; larger ones shrink.")
    ] = 768,
    batch: Annotated[int, typer.Option(help="Images per forward pass.")] = 8,
    save_every: Annotated[int, typer.Option(help="Images after which an interrupted run need not do them again.")] = 64,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Precision of the captioner; auto is bfloat16 on a GPU. The detector runs in float32."),
    ] = Dtype.auto,
    device: DeviceOption = "auto",
    limit: LimitOption = None,
    debug: DebugOption = False,
) -> None:
    """Find the object in every image and describe it without naming its class; writes one Parquet file.

    The same command goes on where an interrupted run stopped. Give the file to refine, probe and
    build with --annotations.
    """
    opened = open_data(
        dataset, data, limit,
        train_classes=train_classes, train_ratio=train_ratio, superclass=superclass, annotations=annotations,
    )  # fmt: skip
    target = choose_device(device)
    from pipeline.annotate.captioner import DEFAULT as DEFAULT_CAPTIONER
    from pipeline.annotate.captioner import INSTRUCTION
    from pipeline.annotate.config import AnnotateConfig
    from pipeline.annotate.detector import DEFAULT as DEFAULT_DETECTOR
    from pipeline.annotate.run import annotate as run_annotate
    from pipeline.annotate.sheet import draw_sheet

    config = AnnotateConfig(
        boxes=boxes.value,
        captions=captions.value,
        detector=DEFAULT_DETECTOR if detector is None else detector,
        detector_revision=detector_revision,
        box_threshold=box_threshold,
        padding=padding,
        captioner=DEFAULT_CAPTIONER if captioner is None else captioner,
        captioner_revision=captioner_revision,
        instruction=INSTRUCTION if instruction is None else instruction,
        max_new_tokens=max_new_tokens,
        crop_side=crop_side,
        dtype=choose_dtype(dtype, target),
        device=str(target),
        batch=batch,
        save_every=save_every,
    )
    rows = run_annotate(opened, config, output or run_folder(dataset) / "annotations.parquet")
    if sheet is not None:
        draw_sheet(opened, rows, sheet_images, sheet)
        typer.echo(f"wrote {sheet}")

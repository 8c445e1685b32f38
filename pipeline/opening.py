"""From what the configuration names to what the steps work on: the data set, the teacher."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cache_schema.devices import use_device
from pipeline.config import DataOptions, TeacherOptions
from pipeline.datasets import Dataset, open_dataset, remarks_of
from pipeline.device import choose_device, choose_dtype

if TYPE_CHECKING:
    from pipeline.teachers import TeacherOutline
    from pipeline.teachers.base import AnyTeacher, Quantization


def open_data(options: DataOptions, log: Callable[[str], None] = print) -> Dataset:
    """Open a data set, with the boxes and captions of an annotation file if one is named; raises DataError."""
    opened = open_dataset(
        options.name,
        options.root,
        options.limit,
        train_classes=options.train_classes,
        train_ratio=options.train_ratio,
        superclass=options.superclass,
    )
    if options.annotations is None:
        _say(opened, log)
        return opened
    from pipeline.datasets.annotated import AnnotatedDataset

    annotated = AnnotatedDataset(opened, options.annotations, partial=options.limit is not None)
    _say(annotated, log)
    log(
        f"{options.annotations}: boxes for {annotated.boxes}, captions for {annotated.captions} of "
        f"{len(opened.samples)} images"
    )
    return annotated


def _say(dataset: Dataset, log: Callable[[str], None]) -> None:
    for remark in remarks_of(dataset):
        log(remark)


def outline_of(options: TeacherOptions) -> "TeacherOutline":
    """What is known of the teacher before it is loaded; raises TeacherError."""
    from pipeline.teachers import outline_teacher

    return outline_teacher(options.name, revision=options.revision, resolution=options.resolution)


def check_teacher(options: TeacherOptions, lora: Path | None = None, taps: Sequence[str] = ()) -> None:
    """Raise for what can be known to be wrong before anything is read but configuration files.

    That is a teacher, a device, a LoRA or a tap which is not there: TeacherError, or DitDistillError of the device.
    """
    from pipeline.teachers.weights import lora_file

    choose_device(options.device)
    outline = outline_of(options)
    for tap in taps:
        outline.tap_shape(tap)
    if lora is not None:
        lora_file(lora)


def open_teacher(options: TeacherOptions, lora: Path | None, log: Callable[[str], None] = print) -> "AnyTeacher":
    """Load a teacher, with the LoRA of Stage I if one is given, and say where; raises TeacherError."""
    from pipeline.teachers import load_teacher
    from pipeline.teachers.loading import Loading

    target = choose_device(options.device)
    dtype = choose_dtype(options.dtype, target)
    log(f"{use_device(target)}, {str(dtype).removeprefix('torch.')}")
    teacher = load_teacher(
        options.name,
        revision=options.revision,
        lora=lora,
        resolution=options.resolution,
        dtype=dtype,
        device=str(target),
        guidance=options.guidance,
        context=options.context,
        input=options.input,
        loading=Loading(quantization_of(options), options.offload, options.compile),
    )
    teacher.crop = options.crop
    return teacher


def quantization_of(options: TeacherOptions) -> "Quantization | None":
    """The number format of the transformer's weights in memory, None as they were saved."""
    return None if options.quantize == "none" else options.quantize

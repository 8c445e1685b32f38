"""Options that several commands of `dit-cache` share, and what they mean. No model library is imported at the top."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache_schema.errors import DitDistillError
from pipeline.datasets import DatasetOptionError, dataset_names, open_dataset
from pipeline.presets import preset_for

if TYPE_CHECKING:
    import torch

    from pipeline.datasets.base import Dataset
    from pipeline.teachers.base import Quantization, Teacher


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(StrEnum):
    none = "none"
    int8 = "int8"
    fp8 = "fp8"

    @property
    def kind(self) -> "Quantization | None":
        """As the pipeline takes it."""
        return None if self is Quantize.none else "int8" if self is Quantize.int8 else "fp8"


class Context(StrEnum):
    joint = "joint"
    reused = "reused"


DatasetOption = Annotated[
    str, typer.Option("--dataset", help=f"Data set: {', '.join(dataset_names())}; demo is built in.")
]
DataOption = Annotated[Path | None, typer.Option("--data", help="Directory of the data set; default data/<dataset>.")]
TrainClassesOption = Annotated[
    str | None,
    typer.Option(help="Data set folder: names of the training classes, a,b,c or a file with one per line."),
]
TrainRatioOption = Annotated[
    float | None, typer.Option(help="Data set folder: share of the classes that train, in class order; default 0.5.")
]
SuperclassOption = Annotated[
    str | None, typer.Option(help="Data set folder: the word for what the images show; default object.")
]
AnnotationsOption = Annotated[
    Path | None,
    typer.Option(
        "--annotations",
        help="Boxes and captions to use: the file of dit-cache annotate, or any .parquet, .csv or .jsonl with id or "
        "file_name, box, caption.",
    ),
]
TeacherOption = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        # Written out, as the table of presets comes with torch and --help is to answer at once; a test compares.
        help="Preset (demo, flux-dev, flux-kontext, flux2-klein, flux2-klein-base, sd35-medium, sd35-large), "
        "diffusers folder, or hub repository.",
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Revision of the hub repository.")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Precision of the teacher; auto is bfloat16 on a GPU, float32 on a CPU.")
]
QuantizeOption = Annotated[
    Quantize, typer.Option(help="Keep the transformer's linear layers in 8 bits: half the memory of bfloat16.")
]
OffloadOption = Annotated[
    bool,
    typer.Option("--offload", help="Keep text encoders and transformer in main memory, on the GPU block by block."),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the transformer's blocks: minutes at the start, faster afterwards.")
]
DeviceOption = Annotated[str, typer.Option(help="Where the teacher runs; auto takes the GPU if there is one.")]
ResolutionOption = Annotated[
    int | None, typer.Option(help="Side of the teacher's views in pixels; default from the preset.")
]
GuidanceOption = Annotated[float, typer.Option(help="Guidance, for teachers whose configuration embeds it.")]
ContextOption = Annotated[
    Context | None,
    typer.Option(
        "--context",
        help="joint: context and noisy tokens see each other; reused: the context sees only itself and is computed "
        "once per image for all timesteps (FLUX.2); default as the teacher was trained.",
        show_default=False,
    ),
]
ConditionsOption = Annotated[
    Path | None,
    typer.Option(
        "--conditions",
        help="Folder of prompt embeddings and latents, computed once and shared by refine, probe and build; default "
        "conditions, beside the output.",
    ),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use only the first N images of each split, to try.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """Parse 10,16,22; anything else is a usage error that names the option."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers like 10,16,22,28", param_hint=option
        ) from None


def parse_names(text: str) -> tuple[str, ...]:
    """Parse a,b,c."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_share(text: str, option: str) -> float:
    """Parse 1% or 0.01 into a share from 0 to 1; anything else is a usage error that names the option."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise typer.BadParameter(f"{text!r} is not a share like 1% or 0.01", param_hint=option)
    return share


def parse_classes(text: str) -> tuple[str, ...]:
    """Class names from a list a,b,c or from a file with one per line."""
    from pipeline.datasets.text_table import decoded_lines

    file = Path(text)
    # A name alone could be either, so a file of that name wins; a path is never a class.
    if "/" in text or (len(text) < 256 and file.is_file()):
        return tuple(line.strip() for line in decoded_lines(file) if line.strip())
    return parse_names(text)


def open_inputs(
    dataset: str, data: Path | None, teacher: str | None, revision: str | None, lora: Path | None, dtype: Dtype,
    device: str, resolution: int | None, guidance: float, limit: int | None, *,
    train_classes: str | None = None, train_ratio: float | None = None, superclass: str | None = None,
    annotations: Path | None = None, context: Context | None = None, quantize: Quantize = Quantize.none,
    offload: bool = False, compile_blocks: bool = False,
) -> "tuple[Dataset, Teacher]":  # fmt: skip
    """Open the data set and load the teacher that the options name."""
    # The data set first: a wrong path should not wait for 24 GB of weights.
    opened = open_data(
        dataset, data, limit,
        train_classes=train_classes, train_ratio=train_ratio, superclass=superclass, annotations=annotations,
    )  # fmt: skip
    return opened, open_teacher(
        dataset, teacher, revision, lora, dtype, device, resolution, guidance, context,
        quantize=quantize, offload=offload, compile_blocks=compile_blocks,
    )  # fmt: skip


def open_data(
    dataset: str, data: Path | None, limit: int | None, *, train_classes: str | None = None,
    train_ratio: float | None = None, superclass: str | None = None, annotations: Path | None = None,
) -> "Dataset":  # fmt: skip
    """Open the data set that the options name, with the boxes and captions of an annotation file if one is given."""
    try:
        opened = open_dataset(
            dataset,
            data,
            limit,
            train_classes=None if train_classes is None else parse_classes(train_classes),
            train_ratio=train_ratio,
            superclass=superclass,
        )
    except DatasetOptionError as error:
        raise typer.BadParameter(str(error)) from None
    if annotations is None:
        return opened
    from pipeline.datasets.annotated import AnnotatedDataset

    annotated = AnnotatedDataset(opened, annotations, partial=limit is not None)
    typer.echo(
        f"{annotations}: boxes for {annotated.boxes}, captions for {annotated.captions} of {len(opened.samples)} images"
    )
    return annotated


def choose_device(device: str) -> "torch.device":
    """The device that --device names; raises DitDistillError if there is none such."""
    import torch

    try:
        target = torch.device(
            "cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu")
        )
    except RuntimeError:
        raise DitDistillError(f"--device {device}: not a device; use auto, cpu or cuda") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DitDistillError(f"--device {device}: this machine has no CUDA GPU that PyTorch can use")
    if target.type == "cuda" and target.index is None:
        # One process per GPU, where accelerate or torchrun started several.
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return target


def choose_dtype(dtype: Dtype, device: "torch.device") -> "torch.dtype":
    """The precision that --dtype names on this device."""
    import torch

    if dtype is Dtype.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, dtype.value)


def open_teacher(
    dataset: str, teacher: str | None, revision: str | None, lora: Path | None, dtype: Dtype, device: str,
    resolution: int | None, guidance: float, context: Context | None = None, *, quantize: Quantize = Quantize.none,
    offload: bool = False, compile_blocks: bool = False,
) -> "Teacher":  # fmt: skip
    """Load the teacher that the options name, or that of the data set's preset."""
    from pipeline.teachers import load_teacher
    from pipeline.teachers.loading import Loading

    target = choose_device(device)
    return load_teacher(
        teacher or preset_for(dataset).teacher,
        revision=revision,
        lora=lora,
        resolution=resolution,
        dtype=choose_dtype(dtype, target),
        device=str(target),
        guidance=guidance,
        context=context.value if context else None,
        loading=Loading(quantize.kind, offload, compile_blocks),
    )

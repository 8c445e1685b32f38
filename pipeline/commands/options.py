"""Options that several commands of `dit-cache` share, and how they are read. No model library is imported at the top.

An option that is a field of the configuration (`pipeline.config.RunConfig`) is None unless given: presets say what it
is then. Where help shows a default, a test holds it against the configuration.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal, overload

import typer

from pipeline.datasets import dataset_names


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(StrEnum):
    none = "none"
    int8 = "int8"
    fp8 = "fp8"


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
    Dtype | None,
    typer.Option(help="Precision of the teacher; auto is bfloat16 on a GPU, float32 on a CPU.", show_default="auto"),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where models run; auto takes the GPU if there is one.", show_default="auto")
]
ResolutionOption = Annotated[
    int | None, typer.Option(help="Side of the teacher's views in pixels; default from the preset.")
]
GuidanceOption = Annotated[
    float | None, typer.Option(help="Guidance, for teachers whose configuration embeds it.", show_default="3.5")
]
ContextOption = Annotated[
    Context | None,
    typer.Option(
        "--context",
        help="joint: context and noisy tokens see each other; reused: the context sees only itself and is computed "
        "once per image for all timesteps (FLUX.2); default as the teacher was trained.",
        show_default=False,
    ),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        "--quantize",
        help="Keep the transformer's linear layers in 8 bits: half the memory of bfloat16.",
        show_default="none",
    ),
]
OffloadOption = Annotated[
    bool | None,
    typer.Option(
        "--offload",
        help="Keep text encoders and transformer in main memory, on the GPU block by block.",
        show_default=False,
    ),
]
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile",
        help="Compile the transformer's blocks: minutes at the start, faster afterwards.",
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


def parse_numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Parse 10,16,22, and leave None; anything else is a usage error that names the option."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of whole numbers like 10,16,22,28", param_hint=option
        ) from None


@overload
def parse_names(text: str) -> tuple[str, ...]: ...
@overload
def parse_names(text: None) -> None: ...
def parse_names(text: str | None) -> tuple[str, ...] | None:
    """Parse a,b,c, and leave None."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def parse_share(text: str | None, option: str) -> float | None:
    """Parse 1% or 0.01 into a share from 0 to 1, and leave None; anything else is a usage error naming the option."""
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise typer.BadParameter(f"{text!r} is not a share like 1% or 0.01", param_hint=option)
    return share


def parse_batch(text: str | None, option: str) -> int | Literal["auto"] | None:
    """Parse a number of images or auto; anything else is a usage error that names the option."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number of images nor auto", param_hint=option)
    return int(text)


def parse_classes(text: str | None) -> tuple[str, ...] | None:
    """Class names from a list a,b,c or from a file with one per line; None is left."""
    if text is None:
        return None
    from pipeline.datasets.text_table import decoded_lines

    file = Path(text)
    # A name alone could be either, so a file of that name wins; a path is never a class.
    if "/" in text or (len(text) < 256 and file.is_file()):
        return tuple(line.strip() for line in decoded_lines(file) if line.strip())
    return parse_names(text)

"""What the heavy job is made of, from data set to cache: one typed, frozen value, checked once, saved with its results.

`RunConfig` is the whole; its parts lie beside what they configure. Presets (`pipeline.presets`), a saved file, options
and `--set` all end here, so that a setting means the same wherever it is given (`cache_schema.settings`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from cache_schema.fields import Setting, SettingsError, check_limits
from cache_schema.format.vocabulary import ContextMode, EncoderInput, ObjectCrop, Quantization
from cache_schema.settings import Settings
from pipeline.annotate.config import AnnotateConfig
from pipeline.build.config import BuildConfig
from pipeline.device import DtypeName
from pipeline.inputs.tolerance import Tolerance
from pipeline.presets import TEACHERS, TIMM_PREFIX, VAE_PREFIX, preset_values
from pipeline.probe.config import ProbeConfig
from pipeline.refine.config import RefineConfig

Step: TypeAlias = Literal["annotate", "refine", "probe", "build", "verify"]
STEPS: tuple[Step, ...] = get_args(Step)


class ConfigError(SettingsError):
    """A setting that does not exist or cannot have this value; the message names it and what it accepts."""


def read_classes(text: str) -> tuple[str, ...]:
    """Class names from a list a,b,c or from a file with one per line; raises DataError for one that is not there."""
    from pipeline.datasets.text_table import decoded_lines

    file = Path(text)
    # A name alone could be either, so a file of that name wins; a path is never a class.
    if "/" in text or (len(text) < 256 and file.is_file()):
        return tuple(line.strip() for line in decoded_lines(file) if line.strip())
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclass(frozen=True)
class DataOptions:
    """Which images. train_classes, train_ratio, superclass: for data sets without a protocol of their own."""

    name: Annotated[str, Setting("Data set.", option="--dataset")]
    root: Annotated[
        Path | None,
        Setting("Directory of the data set; default data/<dataset>.", option="--data", resumable=True),
    ] = None
    limit: Annotated[int | None, Setting("Use only the first N images of each split, to try.", least=1)] = None
    train_classes: Annotated[
        tuple[str, ...] | None,
        Setting(
            "Data set folder: names of the training classes, a,b,c or a file with one per line.", reads=read_classes
        ),
    ] = None
    train_ratio: Annotated[
        float | None,
        Setting("Data set folder: share of the classes that train, in class order; default 0.5."),
    ] = None
    superclass: Annotated[
        str | None, Setting("Data set folder: the word for what the images show; default object.")
    ] = None
    annotations: Annotated[
        Path | None,
        Setting(
            "Boxes and captions to use: the file of dit-cache annotate, or any .parquet, .csv or .jsonl with id or "
            "file_name, box, caption.",
            resumable=True,
        ),
    ] = None

    def __post_init__(self) -> None:
        check_limits(self, ConfigError)


@dataclass(frozen=True)
class TeacherOptions:
    """Which teacher, and how it runs.

    quantize, offload, compile: see `pipeline.teachers.loading.Loading`; Stage I does not offload, because its gradients
    need the whole transformer.
    """

    name: Annotated[str, Setting("The teacher.", option="--teacher")]
    revision: Annotated[str | None, Setting("Revision of the hub repository.")] = None
    resolution: Annotated[int | None, Setting("Side of the teacher's views in pixels; default from the preset.")] = None
    guidance: Annotated[float, Setting("Guidance, for teachers whose configuration embeds it.")] = 3.5
    context: Annotated[
        ContextMode | None,
        Setting(
            "joint: context and noisy tokens see each other; reused: the context sees only itself and is computed "
            "once per image for all timesteps (FLUX.2); default as the teacher was trained."
        ),
    ] = None
    input: Annotated[
        EncoderInput, Setting("What an image encoder is shown: the crop of the object, or the whole image.")
    ] = "object"
    crop: Annotated[
        ObjectCrop,
        Setting("What is shown of an object: its box, squashed to a square, or the square around its box."),
    ] = "box"
    quantize: Annotated[
        Literal["none", Quantization],
        Setting("Keep the transformer's linear layers in 8 bits: half the memory of bfloat16."),
    ] = "none"
    offload: Annotated[
        bool,
        Setting("Keep text encoders and transformer in main memory, on the GPU block by block.", resumable=True),
    ] = False
    compile: Annotated[
        bool,
        Setting("Compile the transformer's blocks: minutes at the start, faster afterwards.", resumable=True),
    ] = False
    dtype: Annotated[DtypeName, Setting("Precision of the teacher; auto is bfloat16 on a GPU, float32 on a CPU.")] = (
        "auto"
    )
    device: Annotated[str, Setting("Where models run; auto takes the GPU if there is one.", resumable=True)] = "auto"

    def __post_init__(self) -> None:
        if self.crop == "square" and self.input == "image":
            raise ConfigError("--crop square is of the object, and --input image shows all: leave out one of the two")
        if self.input == "image" and not self.name.startswith((TIMM_PREFIX, VAE_PREFIX)):
            raise ConfigError(
                f"teacher {self.name}: a diffusion transformer sees object and whole image; leave --input image out"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything from a data set to its cache. steps: what `dit-cache run` does, in this order."""

    data: DataOptions
    teacher: TeacherOptions
    steps: Annotated[tuple[Step, ...], Setting("What is done, in this order.")] = (
        "annotate",
        "refine",
        "build",
        "verify",
    )
    conditions: Annotated[
        Path | None,
        Setting(
            "Folder of prompt embeddings and latents, computed once and shared by refine, probe and build; default "
            "conditions, beside the output."
        ),
    ] = None
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    build: BuildConfig = field(default_factory=BuildConfig)
    tolerance: Tolerance = field(default_factory=Tolerance)

    def __post_init__(self) -> None:
        if not self.steps or [s for s in STEPS if s in self.steps] != list(self.steps):
            raise ConfigError(f"steps: name one or more of {', '.join(STEPS)}, each once and in this order")


SETTINGS = Settings(RunConfig, command="dit-cache run", example="refine.steps=200", error=ConfigError)


def configure(given: Mapping[str, Any], settings: Iterable[str] = (), saved: Path | None = None) -> RunConfig:
    """A configuration: presets or a saved file, then what is given by field, then settings such as `refine.steps=200`.

    The names of a data set and a teacher choose the presets (without: the demo, the data set's teacher), or replace
    those of the saved file. Raises ConfigError, or the part's own error, with one line about the first wrong field.
    """
    settings = tuple(settings)
    known = SETTINGS.given(given, settings)
    if saved is None:
        base = preset_values(known.get("data.name", "demo"), known.get("teacher.name"))
        if "build.taps" not in known:
            _choose_tap(base, known.get("teacher.revision"))
    else:
        base = SETTINGS.plain(SETTINGS.load(saved))
    return SETTINGS.make(base, given, settings)


def _choose_tap(base: dict[str, Any], revision: str | None) -> None:
    """Read a folder or repository of the FLUX families in its middle, as the presets of these families do."""
    name = base["teacher"]["name"]
    if name in TEACHERS or name.startswith((TIMM_PREFIX, VAE_PREFIX)):
        return
    from pipeline.teachers import TeacherError, middle_tap

    try:
        tap = middle_tap(name, revision)
    except TeacherError:
        return  # whoever opens it says why that cannot be done, and when its turn comes
    if tap is not None:
        base["build"]["taps"] = [tap]


def make_config(
    dataset: str | None = None,
    teacher: str | None = None,
    settings: Iterable[str] = (),
    saved: Path | None = None,
    **flags: Any,
) -> RunConfig:
    """The same from Python. flags: field names with `__` for the dot (`refine__steps=200`), None what is not given."""
    return configure({"data__name": dataset, "teacher__name": teacher, **flags}, settings, saved)


def save_config(config: RunConfig, path: Path) -> None:
    """Write the configuration, whole or not at all."""
    from cache_schema.storage.files import write_file

    write_file(path, (SETTINGS.render(config) + "\n").encode())

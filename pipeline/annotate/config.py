"""The configuration of an annotation. Nothing heavy is imported: options of the command line are made from it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from cache_schema.errors import DitDistillError
from cache_schema.fields import Setting, check_limits
from pipeline.device import DtypeName

# {superclass} stands for the word of the data set. The paper gives no wording, only its content: describe the
# features of the [cls], do not name the class.
INSTRUCTION = (
    "Describe the visual features of the {superclass} in this image in one or two sentences: its colours, shape, "
    "patterns and the parts that stand out. Do not name the class of the {superclass}."
)


class AnnotateError(DitDistillError):
    """A model cannot be loaded, or the annotations at a place are of another run; one line says what to do."""


@dataclass(frozen=True)
class AnnotateConfig:
    """What to annotate with what."""

    boxes: Annotated[
        Literal["detector", "dataset", "full"],
        Setting("Where boxes come from: a detector, the data set, or the whole image is the box."),
    ] = "detector"
    captions: Annotated[
        Literal["vlm", "dataset", "none"],
        Setting("Where captions come from: a vision-language model, the data set, or none."),
    ] = "vlm"
    detector: Annotated[str, Setting("Zero-shot detector: hub repository or folder.")] = (
        "IDEA-Research/grounding-dino-base"
    )
    detector_revision: Annotated[str | None, Setting("Revision of the detector's repository.")] = None
    box_threshold: Annotated[float, Setting("A detection's score must be above this.", least=0, most=1)] = 0.3
    padding: Annotated[
        float,
        Setting("Share of a box's sides to add around it, whether detected or the data set's.", least=0, most=1),
    ] = 0.05
    captioner: Annotated[str, Setting("Image-text-to-text chat model: hub repository or folder.")] = (
        "Qwen/Qwen2.5-VL-7B-Instruct"
    )
    captioner_revision: Annotated[str | None, Setting("Revision of the captioner's repository.")] = None
    instruction: Annotated[
        str,
        Setting(
            "What the captioner is told; {superclass} stands for the data set's word. Default: describe its features, "
            "do not name its class.",
            shown="",
        ),
    ] = INSTRUCTION
    max_new_tokens: Annotated[int, Setting("Longest caption, in tokens of the captioner.", least=1)] = 96
    crop_side: Annotated[
        int, Setting("Longer side, in pixels, of the crop that the captioner sees; larger ones shrink.", least=1)
    ] = 768
    dtype: Annotated[
        DtypeName,
        Setting("Precision of the captioner; auto is bfloat16 on a GPU. The detector runs in float32."),
    ] = "auto"
    device: Annotated[str, Setting("Where models run; auto takes the GPU if there is one.", resumable=True)] = "auto"
    batch: Annotated[int, Setting("Images per forward pass.", least=1, resumable=True)] = 8
    save_every: Annotated[
        int, Setting("Images after which an interrupted run need not do them again.", least=1, resumable=True)
    ] = 64

    def __post_init__(self) -> None:
        check_limits(self, AnnotateError)
        if not self.instruction.strip():
            raise AnnotateError("--instruction is empty; leave it out to use the built-in one")

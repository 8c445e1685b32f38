"""What image encoders have in common: taps whose shapes are known, and one timestep without noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.teachers.architecture import Architecture
from pipeline.teachers.base import ContextMode, ObjectCrop, Quantization, TapShape, TeacherError


@dataclass(frozen=True)
class EncoderArchitecture(Architecture):
    """The taps of an image encoder, which has neither latents nor text."""

    shapes: tuple[TapShape, ...] = ()

    def latent_values(self, resolution: int, source: str) -> int:
        return 0

    def taps(self) -> list[str]:
        return [shape.name for shape in self.shapes]

    def tap_shape(self, tap: str, resolution: int, source: str) -> TapShape:
        found = next((shape for shape in self.shapes if shape.name == tap), None)
        if found is None:
            raise TeacherError(f"the teacher {source} has no tap {tap!r}; it has {', '.join(self.taps())}")
        return found


def encoder_architecture(family: str, shapes: Sequence[TapShape]) -> EncoderArchitecture:
    """Of the shapes of all taps, from the input to the output."""
    return EncoderArchitecture(family, 0, shapes[-1].channels, (), shapes=tuple(shapes))


class Encoder:
    """The part of `base.ImageEncoder` that does not depend on the network."""

    guidance: float | None = None
    step_distilled: bool = False
    lora: Path | None = None
    context: ContextMode = "joint"
    quantization: Quantization | None = None
    crop: ObjectCrop = "box"
    source: str
    resolution: int
    architecture: EncoderArchitecture

    def taps(self, modulated: bool = False) -> list[str]:
        """Every tap there is, from the input to the output; no timestep modulates any."""
        return self.architecture.taps()

    def tap_shape(self, tap: str) -> TapShape:
        """Shape of a tap; raises TeacherError, listing the known taps, for an unknown one."""
        return self.architecture.tap_shape(tap, self.resolution, self.source)

    def sigmas(self, num_steps: int) -> list[float]:
        """One noise level, 0; raises TeacherError for a schedule of more steps than that."""
        if num_steps != 1:
            raise TeacherError(
                f"the teacher {self.source} sees images without noise: it has one timestep, --num-steps 1 --timesteps 1"
            )
        return [0.0]

"""Which part of a photograph the teacher is shown under each view."""

import math
import struct
from dataclasses import dataclass

from cache_schema.format.vocabulary import EncoderInput, ObjectCrop
from pipeline.curriculum import keyed_generator
from pipeline.inputs.views import Box, inside, is_crop

# As RandomResizedCrop draws them (Szegedy et al. 2015), but for the scale: a hundredth of a photograph shows nothing.
DEFAULT_SCALE, DEFAULT_RATIO = (0.2, 1.0), (0.75, 1.3333)


@dataclass(frozen=True)
class Framing:
    """How views are cut: of what the teacher sees, the crop of the object or (an image encoder) the whole image.

    object_crop: what the crop of the object is. The others say how random crops are drawn, always inside the box or the
    image. scale: share of its area, ratio: of width to height, each from least to most.
    """

    input: EncoderInput = "object"
    seed: int = 0
    scale: tuple[float, float] = DEFAULT_SCALE
    ratio: tuple[float, float] = DEFAULT_RATIO
    object_crop: ObjectCrop = "box"

    def crop(self, sample_id: str, view: str, size: tuple[int, int], box: Box) -> Box:
        """The box (left, top, right, bottom) of the view `crop.k` in fractions of an upright image of `size`.

        A pure function of seed, id and k: the share of the area and the logarithm of the ratio are uniform, and a crop
        that would be longer than what it is cut from is cut to it. box: the object's, in pixels. In values that single
        precision holds, as the samples table does. Raises ValueError if nothing of the object is inside the image.
        """
        x0, y0, x1, y1 = (0.0, 0.0, *map(float, size)) if self.input == "image" else inside(box, size)
        width, height = x1 - x0, y1 - y0
        draws = keyed_generator(self.seed, sample_id, view, "crop").random(4)
        area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * draws[0])
        low, high = (math.log(ratio) for ratio in self.ratio)
        ratio = math.exp(low + (high - low) * draws[1])
        # A pixel at least, or there would be nothing to resize.
        w, h = (
            min(side, max(1.0, wanted))
            for side, wanted in ((width, math.sqrt(area * ratio)), (height, math.sqrt(area / ratio)))
        )
        left, top = x0 + draws[2] * (width - w), y0 + draws[3] * (height - h)
        edges = left / size[0], top / size[1], (left + w) / size[0], (top + h) / size[1]
        return _single(tuple(min(1.0, edge) for edge in edges))

    def identity(self, sample_id: str, view: str) -> dict[str, object]:
        """What decides the pixels of a view beside the image, its box and the name of the view."""
        if not is_crop(view):
            return {} if self.object_crop == "box" else {"object_crop": self.object_crop}
        return {"crop": [self.input, self.seed, sample_id, list(self.scale), list(self.ratio)]}


def _single(box: tuple[float, ...]) -> Box:
    """The values of a box in single precision."""
    x0, y0, x1, y1 = struct.unpack("4f", struct.pack("4f", *box))
    return x0, y0, x1, y1

"""Images that stay in memory between the scan of a data set and the uses that a build makes of them."""

import threading
from collections.abc import Sequence

from PIL import Image

from cache_schema.memory import available_memory
from pipeline.datasets.base import Dataset, Sample, remarks_of
from pipeline.inputs.views import Box

_SHARE, _MOST = 8, 2 << 30  # an eighth of the memory that is free, at most 2 GiB


class DecodedImages:
    """A data set whose images are kept once decoded, as many as `limit` bytes hold; the others are read again.

    Safe in several threads. What is kept is not changed by anybody: views are made by cropping and resizing copies.
    """

    def __init__(self, dataset: Dataset, limit: int | None = None) -> None:
        """`limit` in bytes; None takes a share of the free memory."""
        self._dataset = dataset
        self.name, self.protocol, self.superclass = dataset.name, dataset.protocol, dataset.superclass
        self.samples: Sequence[Sample] = dataset.samples
        self.remarks = remarks_of(dataset)
        self._room = available_memory() // _SHARE if limit is None else limit
        self._room = min(self._room, _MOST)
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[Image.Image, Box]] = {}

    def read(self, sample: Sample) -> bytes:
        """The encoded image, as the data set has it."""
        return self._dataset.read(sample)

    def keep(self, sample: Sample, image: Image.Image, box: Box) -> None:
        """Keep an upright RGB image and its box, unless there is no room left."""
        size = 4 * image.width * image.height  # Pillow spends four bytes on a pixel of three
        with self._lock:
            if size <= self._room and sample.id not in self._kept:
                self._room -= size
                self._kept[sample.id] = image, box

    def kept(self, sample: Sample) -> tuple[Image.Image, Box] | None:
        """The image and its box, if they were kept."""
        return self._kept.get(sample.id)

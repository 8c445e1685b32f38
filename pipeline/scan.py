"""The first pass over a data set: every image is read, decoded and digested once, and bad ones are set aside."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from cache_schema.samples import row_rank
from pipeline.conditions import UNREADABLE, caption_of, decode_with_box
from pipeline.datasets.base import Dataset, Sample
from pipeline.views import object_view


@dataclass(frozen=True)
class ScannedSample:
    """A sample with what its file turned out to be, upright. reason is empty unless the sample is quarantined."""

    sample: Sample
    sha256: str
    width: int
    height: int
    box: tuple[float, float, float, float]
    caption: str
    reason: str

    @property
    def ok(self) -> bool:
        return not self.reason

    @property
    def state(self) -> str:
        return "ok" if self.ok else "quarantined"

    def row(self) -> dict:
        """This sample as a row of samples.parquet."""
        s = self.sample
        return {
            "id": s.id, "split": s.split, "label": s.label, "class_name": s.class_name, "source": s.source,
            "sha256": self.sha256, "width": self.width, "height": self.height, "box": list(self.box),
            "box_source": s.box_source if s.box else "full", "caption": self.caption,
            "state": self.state, "reason": self.reason,
        }  # fmt: skip


def scan_sample(dataset: Dataset, sample: Sample) -> ScannedSample:
    """Read and decode one image. Whatever is wrong with it becomes the reason of its quarantine, never an exception."""
    caption = caption_of(sample, dataset.superclass)
    nothing = (0.0, 0.0, 0.0, 0.0)
    try:
        data = dataset.read(sample)
    except OSError as error:
        return ScannedSample(sample, "0" * 64, 0, 0, nothing, caption, f"cannot be read: {error.strerror or error}")
    digest = hashlib.sha256(data).hexdigest()
    try:
        image, box = decode_with_box(data, sample.box)
    except UNREADABLE as error:
        return ScannedSample(sample, digest, 0, 0, nothing, caption, f"not a complete image: {error}".splitlines()[0])
    reason = ""
    try:
        object_view(image, box, 1)
    except ValueError as error:
        reason = str(error)
    return ScannedSample(sample, digest, image.width, image.height, box, caption, reason)


def scan(dataset: Dataset, feature_splits: Sequence[str]) -> list[ScannedSample]:
    """Scan a whole data set into cache row order: rows with features first, then the others, quarantined rows last."""
    scanned = [scan_sample(dataset, s) for s in tqdm(dataset.samples, desc="scan", unit="image")]
    return sorted(scanned, key=lambda entry: row_rank(entry.sample.split, entry.state, feature_splits))

"""The first pass over a data set: every image is read, decoded and digested once, and bad ones are set aside."""

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tqdm import tqdm

from cache_schema.format.duplicates import find_duplicates
from cache_schema.format.samples import CROPS, row_rank
from cache_schema.read_ahead import ReadAhead
from pipeline.datasets.base import Dataset, Sample
from pipeline.inputs.conditions import caption_of
from pipeline.inputs.decoded import DecodedImages
from pipeline.inputs.decoding import UNREADABLE, decode_with_box, reason_of
from pipeline.inputs.framing import Framing
from pipeline.inputs.pixel_range import bits_used
from pipeline.inputs.tolerance import BadSamples, TooManyBadSamples
from pipeline.inputs.views import is_crop, object_view
from pipeline.watchdog import watched

_NO_BOX = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ScannedSample:
    """A sample with what its file turned out to be, upright. reason is empty unless the sample is quarantined.

    few_bits: how many of 16 bits its values use, where these are suspiciously few (`bits_used`).
    """

    sample: Sample
    sha256: str
    width: int
    height: int
    box: tuple[float, float, float, float]
    caption: str
    reason: str
    few_bits: int | None = None

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

    def crops(self, views: Sequence[str], framing: Framing) -> dict:
        """What the random crops among some views show of this sample, for its row of samples.parquet."""
        names = [view for view in views if is_crop(view)]
        if not names or not self.ok:
            return {}
        return {CROPS: [framing.crop(self.sample.id, name, (self.width, self.height), self.box) for name in names]}


def has_captions(dataset: Dataset) -> bool:
    """Say whether a data set comes with captions, so that an image without one is an accident."""
    return any(s.caption.strip() for s in dataset.samples)


def scan_sample(dataset: Dataset, sample: Sample, needs_caption: bool = False) -> ScannedSample:
    """Read and decode one image. Whatever is wrong with it becomes the reason of its quarantine, never an exception."""
    with watched("scan", "reading and decoding it", [sample.id], [sample.source]):
        return _scan_sample(dataset, sample, needs_caption)


def _scan_sample(dataset: Dataset, sample: Sample, needs_caption: bool) -> ScannedSample:
    caption = caption_of(sample, dataset.superclass)
    try:
        data = dataset.read(sample)
    except OSError as error:
        return ScannedSample(sample, "0" * 64, 0, 0, _NO_BOX, caption, f"cannot be read: {error.strerror or error}")
    digest = hashlib.sha256(data).hexdigest()
    if not data:
        return ScannedSample(sample, digest, 0, 0, _NO_BOX, caption, "the file is empty")
    try:
        image, box = decode_with_box(data, sample.box)
    except UNREADABLE as error:
        return ScannedSample(sample, digest, 0, 0, _NO_BOX, caption, reason_of(error))
    reason = ""
    try:
        object_view(image, box, 1)
    except ValueError as error:
        reason = str(error)
    if needs_caption and not sample.caption.strip():
        reason, caption = reason or "its caption is empty", sample.caption
    if not reason and isinstance(dataset, DecodedImages):
        dataset.keep(sample, image, box)
    kept_box = box if all(map(math.isfinite, box)) else _NO_BOX
    return ScannedSample(sample, digest, image.width, image.height, kept_box, caption, reason, bits_used(data))


def scan(
    dataset: Dataset,
    feature_splits: Sequence[str],
    *,
    use_captions: bool = True,
    bad: BadSamples | None = None,
    hung: Mapping[str, str] = MappingProxyType({}),
) -> list[ScannedSample]:
    """Scan a whole data set into cache row order: rows with features first, then the others, quarantined rows last.

    hung: id → why an image is set aside without being looked at. With use_captions an image without a caption is set
    aside if others have one. Bad samples are added to `bad`, which may raise TooManyBadSamples, and checked at the end.
    What may be wrong with the others, the same file in two classes or values of fewer bits than their files, is said
    with a count; where nothing bad is tolerated, such files raise it.
    """
    needs_caption = use_captions and has_captions(dataset)
    scanned = []
    for entry in tqdm(_scan_all(dataset, needs_caption, hung), total=len(dataset.samples), desc="scan", unit="image"):
        scanned.append(entry)
        if bad and not entry.ok:
            bad.add(entry.sample.source, entry.reason)
    if bad:
        bad.check()
        _say_few_bits(scanned, bad)
        _say_duplicates(scanned, bad)
    return sorted(scanned, key=lambda entry: row_rank(entry.sample.split, entry.state, feature_splits))


def _say_few_bits(scanned: Sequence[ScannedSample], bad: BadSamples) -> None:
    few = [entry for entry in scanned if entry.ok and entry.few_bits]
    if few:
        bits = max(entry.few_bits or 0 for entry in few)
        bad.log(
            f"warning: {len(few)} images of 16 bits use at most {bits} of them and are read as dark ones, such as "
            f"{few[0].sample.source}; if {bits} bits are their whole range, save them in 8 bits"
        )


def _say_duplicates(scanned: Sequence[ScannedSample], bad: BadSamples) -> None:
    found = find_duplicates(entry.row() for entry in scanned)
    if not found:
        return
    leaks = sum(duplicate.leaks for duplicate in found)
    text = (
        f"{len(found)} files are in several classes or splits, {leaks} of them in training and in test, such as "
        f"{found[0]}; "
        "remove all but one of each"
    )
    if bad.tolerance.strict:
        raise TooManyBadSamples(f"--strict: {text}, or build without --strict")
    bad.log(f"warning: {text}; `dit-cache info` names them")


def _scan_all(dataset: Dataset, needs_caption: bool, hung: Mapping[str, str]) -> Iterator[ScannedSample]:
    """Scan with as many threads as there are processors (decoding and hashing let them run), in the given order."""

    def scan(sample: Sample) -> ScannedSample:
        if sample.id in hung:
            caption = caption_of(sample, dataset.superclass)
            return ScannedSample(sample, "0" * 64, 0, 0, _NO_BOX, caption, hung[sample.id])
        return scan_sample(dataset, sample, needs_caption)

    with ReadAhead(scan, threads=os.cpu_count() or 1) as ahead:
        yield from ahead.over(dataset.samples)

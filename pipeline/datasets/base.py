"""What a data set is to the pipeline: a list of samples and a way to read one image. Adding one is one file."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol, TypeVar

from cache_schema.errors import DitDistillError

SPLITS = ("train", "unlabeled", "test")

Item = TypeVar("Item")


class DataError(DitDistillError):
    """The data set is missing, incomplete or malformed; the message names the file and what it should hold."""


class DatasetOptionError(DataError):
    """An option that this data set does not take, or a value that it cannot have; a command calls it wrong usage."""


@dataclass(frozen=True)
class Sample:
    """One image and what is known about it, before its pixels are read.

    box: (x0, y0, x1, y1) in pixels of the stored image, before EXIF turns it upright, or None for the whole image.
    label: index of the class over the whole data set; −1 where the image has none.
    """

    id: str
    split: str
    label: int
    class_name: str
    source: str
    box: tuple[float, float, float, float] | None
    box_source: str
    caption: str


class Dataset(Protocol):
    """A data set under an open-set protocol: classes of `train` and `test` are disjoint.

    name: the key of the registry. protocol: how the splits were made, in one line. superclass: the word a detector
    or a caption would use ("bird", "car"). samples: all images of all splits, in a fixed order.
    """

    name: str
    protocol: str
    superclass: str

    @property
    def samples(self) -> Sequence[Sample]: ...

    def read(self, sample: Sample) -> bytes:
        """The encoded image file of a sample. Raises OSError if it cannot be read."""
        ...


def remarks_of(dataset: Dataset) -> Sequence[str]:
    """What a data set says about what it found, a line each, such as files that it passed over.

    These are its `remarks`; one that never has anything to say need not have any.
    """
    return getattr(dataset, "remarks", ())


def split_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """Number of images per split, in the order train, unlabeled, test."""
    counts = Counter(s.split for s in samples)
    return {split: counts[split] for split in SPLITS if counts[split]}


def first_of_each_split(
    items: Iterable[Item], limit: int | None, split_of: Callable[[Item], str] = attrgetter("split")
) -> list[Item]:
    """The first `limit` samples of every split, in order; all of them where limit is None.

    split_of: for items that are not samples yet.
    """
    taken: Counter[str] = Counter()
    kept = []
    for item in items:
        split = split_of(item)
        taken[split] += 1
        if limit is None or taken[split] <= limit:
            kept.append(item)
    return kept


def limited(protocol: str, limit: int | None) -> str:
    """The protocol's line, saying so where only a part of the data is used."""
    return protocol if limit is None else f"{protocol}; only the first {limit} images of each split"


def check_open_set(samples: Sequence[Sample], where: str) -> None:
    """Raise DataError unless ids are unique, a training image exists and train and test share no class."""
    repeated = [i for i, n in Counter(s.id for s in samples).items() if n > 1]
    if repeated:
        raise DataError(f"{where}: sample id {repeated[0]!r} occurs more than once; ids must be unique")
    odd = [s for s in samples if (s.label < 0) != (s.split == "unlabeled")]
    if odd:
        raise DataError(f"{where}: {odd[0].id} is in split {odd[0].split} and has label {odd[0].label}")
    names = {s.label: s.class_name for s in samples}
    train = {s.label for s in samples if s.split == "train"}
    test = {s.label for s in samples if s.split == "test"}
    if not train:
        raise DataError(f"{where}: no training image found")
    if train & test:
        shared = names[min(train & test)]
        raise DataError(f"{where}: class {shared!r} is in train and in test; the protocol is open-set")

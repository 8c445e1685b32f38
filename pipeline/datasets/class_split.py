"""Which classes train and which test, for data sets that leave it to the user."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipeline.datasets.base import DatasetOptionError
from pipeline.datasets.class_names import find_class


def in_class_order(names: Collection[str]) -> list[str]:
    """Class names by code point, as torchvision's ImageFolder sorts them; by value if all are whole numbers."""
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


@dataclass(frozen=True)
class ClassSplit:
    """Either the names of the training classes or their share of all classes; the others are test classes."""

    train_classes: tuple[str, ...] | None = None
    train_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.train_classes is not None and self.train_ratio is not None:
            raise DatasetOptionError("--train-classes and --train-ratio say the same in two ways; give one of them")
        if self.train_ratio is not None and not 0 < self.train_ratio < 1:
            raise DatasetOptionError(f"--train-ratio {self.train_ratio}: must lie between 0 and 1, for example 0.5")
        if self.train_classes is not None and not self.train_classes:
            raise DatasetOptionError("--train-classes names no class")

    def choose(self, names: Sequence[str], where: str) -> tuple[frozenset[str], str]:
        """Training classes among `names`, which are in class order, and the rule as a line for the protocol.

        Raises DatasetOptionError if a named class is not there or no class is left to test on.
        """
        if self.train_classes is not None:
            found = {name: find_class(name, names) for name in self.train_classes}
            unknown = [name for name, known in found.items() if known is None]
            if unknown:
                raise DatasetOptionError(f"--train-classes: {where} has no image of a class {unknown[0]!r}")
            train = frozenset(known for known in found.values() if known is not None)
            rule = f"{len(train)} classes by name train, the other {len(names) - len(train)} test"
        else:
            ratio = 0.5 if self.train_ratio is None else self.train_ratio
            # Of an odd number, half rounds up: the middle class trains, as in NABirds.
            count = min(max(1, int(len(names) * ratio + 0.5)), max(1, len(names) - 1))
            train = frozenset(names[:count])
            rule = f"classes in name order: the first {count} train, the other {len(names) - count} test"
        if len(train) == len(names):
            raise DatasetOptionError(f"{where}: all {len(names)} classes would train and none test; leave some out")
        return train, rule

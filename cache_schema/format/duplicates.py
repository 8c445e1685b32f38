"""The same file in several places of a data set: in two classes, or in training and test, where it spoils a score."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Duplicate:
    """Samples whose files have the same bytes, with their classes and splits (sorted, each once)."""

    ids: tuple[str, ...]
    classes: tuple[str, ...]
    splits: tuple[str, ...]

    @property
    def leaks(self) -> bool:
        """Whether a file of the test is also learnt from, with its label or without."""
        return "test" in self.splits and len(self.splits) > 1

    def __str__(self) -> str:
        where = " and ".join(self.splits)
        return f"{' = '.join(self.ids)}: in {where}, class {' and '.join(self.classes)}"


def find_duplicates(rows: Iterable[Mapping[str, Any]]) -> list[Duplicate]:
    """Files under several classes or both learnt from and in test, in the order of the rows (of a samples table).

    Quarantined rows do not count, as nothing is made of them, nor do files that are twice in one class and split.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["state"] == "ok":
            groups[row["sha256"]].append(row)
    found = []
    for group in (group for group in groups.values() if len(group) > 1):
        duplicate = Duplicate(
            tuple(row["id"] for row in group),
            tuple(sorted({row["class_name"] for row in group if row["label"] >= 0})),
            tuple(sorted({row["split"] for row in group})),
        )
        if len({row["label"] for row in group if row["label"] >= 0}) > 1 or duplicate.leaks:
            found.append(duplicate)
    return found

"""Data sets by name. A new one is one file beside these and one line in `_DATASETS`."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pipeline.datasets.base import DataError, Dataset, DatasetOptionError, Sample, remarks_of, split_counts

__all__ = [
    "DataError",
    "Dataset",
    "DatasetOptionError",
    "Sample",
    "dataset_names",
    "open_dataset",
    "remarks_of",
    "split_counts",
]

# Classes by their place, so that a data set is imported when it is opened. They are called with root and limit, and
# with those options of `open_dataset` that they name among their arguments.
_DATASETS = {
    "cars": "pipeline.datasets.cars:CarsDataset",
    "cub": "pipeline.datasets.cub:CubDataset",
    "demo": "pipeline.datasets.demo:DemoDataset",
    "dogs": "pipeline.datasets.dogs:DogsDataset",
    "folder": "pipeline.datasets.folder:FolderDataset",
    "nabirds": "pipeline.datasets.nabirds:NabirdsDataset",
}


def dataset_names() -> list[str]:
    """Names that `open_dataset` knows."""
    return sorted(_DATASETS)


def open_dataset(
    name: str,
    root: Path | None = None,
    limit: int | None = None,
    *,
    train_classes: Sequence[str] | None = None,
    train_ratio: float | None = None,
    superclass: str | None = None,
) -> Dataset:
    """Open a data set by name; `root` is its directory (default data/<name>), `limit` keeps that many images per split.

    The other options are for data sets without a protocol of their own (`folder`, see `FolderDataset`). Raises
    DatasetOptionError if one is given to another data set, DataError if the name is unknown or the directory is not
    what it must be.
    """
    if name not in _DATASETS:
        raise DataError(f"unknown data set {name!r}; known are {', '.join(dataset_names())}")
    opener = resolve_name(_DATASETS[name])
    accepted = inspect.signature(opener).parameters
    options = {"train_classes": train_classes, "train_ratio": train_ratio, "superclass": superclass}
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if superclass is not None:
        given["superclass"] = plain_superclass(superclass)
    for key in given:
        if key not in accepted:
            raise DatasetOptionError(
                f"data set {name} has a protocol of its own and does not take --{key.replace('_', '-')}; "
                "it is for --dataset folder"
            )
    if "root" in accepted:
        return opener(root=Path("data") / name if root is None else Path(root), limit=limit, **given)
    if root is not None:
        raise DataError(f"data set {name} is made from a seed and reads no directory; leave out --data {root}")
    return opener(limit=limit, **given)


def plain_superclass(text: str) -> str:
    """The word for what the images show, without a final dot. Raises DatasetOptionError for none, or one with dots.

    Detectors read a dot as the end of one thing to look for, and captions put the word into a sentence.
    """
    word = " ".join(text.split()).removesuffix(".").rstrip()
    if not word or "." in word:
        raise DatasetOptionError(f"--superclass {text!r}: expected the word for what the images show, such as beetle")
    return word

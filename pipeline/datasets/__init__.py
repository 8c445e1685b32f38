"""Data sets by name. A new one is one file beside these and one line in `_OPENERS`."""

from collections.abc import Callable
from pathlib import Path

from pipeline.datasets.base import DataError, Dataset, Sample, split_counts

__all__ = ["DataError", "Dataset", "Sample", "dataset_names", "open_dataset", "split_counts"]


def _demo(root: Path | None, limit: int | None) -> Dataset:
    from pipeline.datasets.demo import DemoDataset

    if root is not None:
        raise DataError(f"data set demo is rendered from a seed and reads no directory; leave out --data {root}")
    return DemoDataset(limit=limit)


def _cars(root: Path | None, limit: int | None) -> Dataset:
    from pipeline.datasets.cars import CarsDataset

    return CarsDataset(_default_root("cars", root), limit)


_OPENERS: dict[str, Callable[[Path | None, int | None], Dataset]] = {"demo": _demo, "cars": _cars}


def _default_root(name: str, root: Path | None) -> Path:
    return Path("data") / name if root is None else root


def dataset_names() -> list[str]:
    """Names that `open_dataset` knows."""
    return sorted(_OPENERS)


def open_dataset(name: str, root: Path | None = None, limit: int | None = None) -> Dataset:
    """Open a data set by name; `root` is its directory (default data/<name>), `limit` keeps that many images per split.

    Raises DataError if the name is unknown or the directory is not what it must be.
    """
    if name not in _OPENERS:
        raise DataError(f"unknown data set {name!r}; known are {', '.join(dataset_names())}")
    return _OPENERS[name](root, limit)

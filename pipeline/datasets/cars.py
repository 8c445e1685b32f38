"""Stanford Cars in its official layout; classes 1–98 train, 99–196 test (open-set retrieval)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.datasets.base import DataError, Sample, check_open_set, first_of_each_split, limited

_PUBLISHED = "Stanford Cars (Krause et al., 2013), https://ai.stanford.edu/~jkrause/cars/car_dataset.html"
_PROTOCOL = "official train and test halves merged; classes 1–98 train, classes 99–196 test"
_LAST_TRAIN_CLASS = 98
# (image folder, annotation file, required). The official test half carries labels only in the `_withlabels` file.
_HALVES = (
    ("cars_train", "cars_train_annos.mat", True),
    ("cars_test", "cars_test_annos_withlabels.mat", False),
)


class CarsDataset:
    """Both official halves merged, then split by class. `cars_test/` may be absent; any class may be absent.

    Raises DataError naming the directory, what it must contain and where the data set is published.
    """

    name = "cars"
    superclass = "car"

    def __init__(self, root: Path, limit: int | None = None):
        self.root = Path(root)
        self.protocol = limited(_PROTOCOL, limit)
        for needed in ("cars_train", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat"):
            if not (self.root / needed).exists():
                raise DataError(
                    f"data set cars: looked in {self.root} and found no {needed}; it must contain cars_train/*.jpg, "
                    "devkit/cars_meta.mat and devkit/cars_train_annos.mat (optionally cars_test/ and "
                    f"devkit/cars_test_annos_withlabels.mat); published as {_PUBLISHED}"
                )
        meta = _load_mat(self.root / "devkit/cars_meta.mat", "class_names")
        self.class_names = [str(name) for name in meta.reshape(-1)]
        self.samples: Sequence[Sample] = ()
        for folder, annotations, required in _HALVES:
            images, table = self.root / folder, self.root / "devkit" / annotations
            if required or (images.is_dir() and table.exists()):
                self.samples = [*self.samples, *self._half(folder, table)]
            elif images.is_dir():
                raise DataError(
                    f"data set cars: {images} is there but {table} is not; without labels it cannot be split "
                    f"by class: add the file ({_PUBLISHED}) or move {folder}/ away"
                )
        self.samples = first_of_each_split(self.samples, limit)
        check_open_set(self.samples, f"data set cars in {self.root}")

    def _half(self, folder: str, table: Path) -> list[Sample]:
        samples = []
        for row, entry in enumerate(_load_mat(table, "annotations").reshape(-1), start=1):
            try:
                label, name = int(entry.__dict__["class"]), str(entry.fname)
                x0, y0, x1, y1 = (int(getattr(entry, f"bbox_{k}")) for k in ("x1", "y1", "x2", "y2"))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{table}: annotation {row}: no readable {error}; expected fname, class and bbox_*"
                ) from None
            if not 1 <= label <= len(self.class_names):
                raise DataError(
                    f"{table}: annotation {row} ({name}): class {label} is not in 1–{len(self.class_names)}"
                )
            class_name = self.class_names[label - 1]
            samples.append(
                Sample(
                    id=f"{folder}/{Path(name).stem}",
                    split="train" if label <= _LAST_TRAIN_CLASS else "test",
                    label=label - 1,
                    class_name=class_name,
                    source=f"{folder}/{name}",
                    # MATLAB boxes are 1-based and inclusive; ours are 0-based and half-open.
                    box=(float(x0 - 1), float(y0 - 1), float(x1), float(y1)),
                    box_source="dataset",
                    caption="",
                )
            )
        return samples

    def read(self, sample: Sample) -> bytes:
        """The JPEG file as it is."""
        return (self.root / sample.source).read_bytes()


def _load_mat(path: Path, key: str) -> Any:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(path, squeeze_me=True, struct_as_record=False)
    except (MatReadError, ValueError, TypeError, OSError, NotImplementedError) as error:
        raise DataError(f"{path}: not a readable MATLAB file ({error}); download it again from {_PUBLISHED}") from None
    if key not in content:
        raise DataError(f"{path}: holds no {key!r} (has {sorted(k for k in content if k[0] != '_')})")
    import numpy as np

    return np.atleast_1d(content[key])

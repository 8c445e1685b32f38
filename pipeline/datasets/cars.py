"""Stanford Cars in one of its official layouts; classes 1–98 train, 99–196 test (open-set retrieval)."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.datasets.base import DataError, Sample, check_open_set, first_of_each_split, limited
from pipeline.datasets.boxes import coordinate, from_inclusive
from pipeline.datasets.image_files import (
    read_image_file,
    relative_path,
    renamed_by_download,
    require_layout,
    where_instead,
)
from pipeline.datasets.matlab import load_mats, variable, whole

_PUBLISHED = "Stanford Cars (Krause et al., 2013), https://ai.stanford.edu/~jkrause/cars/car_dataset.html"
_LAYOUT = (
    "cars_train/*.jpg, devkit/cars_meta.mat and devkit/cars_train_annos.mat (optionally cars_test/ and "
    "devkit/cars_test_annos_withlabels.mat), or car_ims/ and cars_annos.mat"
)
_SPLIT = "classes 1–98 train, classes 99–196 test"
_LAST_TRAIN_CLASS = 98
_TEST_ANNOTATIONS = "cars_test_annos_withlabels.mat"


class CarsDataset:
    """Both official halves merged, then split by class. `cars_test/` may be absent; any class may be absent.

    The layout of one file for both halves (`car_ims/`, `cars_annos.mat`) is read too. Raises DataError naming the
    directory, what it must contain and where the data set is published, or the annotation that is wrong.
    """

    name = "cars"
    superclass = "car"

    def __init__(self, root: Path, limit: int | None = None):
        self.root = Path(root)
        in_one = any((self.root / part).exists() for part in ("cars_annos.mat", "car_ims"))
        if in_one and not (self.root / "cars_train").exists():
            halves, samples = "official train and test halves merged", self._one_file()
        else:
            halves, samples = self._two_halves()
        self.protocol = limited(f"{halves}; {_SPLIT}", limit)
        self.samples: Sequence[Sample] = first_of_each_split(samples, limit)
        check_open_set(self.samples, f"data set cars in {self.root}")

    def _one_file(self) -> list[Sample]:
        require_layout(self.name, self.root, ("car_ims", "cars_annos.mat"), _LAYOUT, _PUBLISHED)
        table = self.root / "cars_annos.mat"
        (content,) = load_mats([table], ("annotations", "class_names"), _PUBLISHED)
        names = [str(name) for name in variable(table, content, "class_names")]
        return _annotated("", table, variable(table, content, "annotations"), "relative_im_path", names)

    def _two_halves(self) -> tuple[str, list[Sample]]:
        devkit = self.root / "devkit"
        needed: tuple[str, ...] = ("cars_train", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat")
        with_test = (self.root / "cars_test").is_dir()
        needed += ("cars_test",) if with_test or renamed_by_download(self.root, "cars_test") else ()
        require_layout(self.name, self.root, needed, _LAYOUT, _PUBLISHED)
        tables = {"cars_train/": devkit / "cars_train_annos.mat"}
        if with_test:
            tables["cars_test/"] = self._test_annotations()
        meta = devkit / "cars_meta.mat"
        names, *halves = load_mats([meta, *tables.values()], ("annotations", "class_names"), _PUBLISHED)
        class_names = [str(name) for name in variable(meta, names, "class_names")]
        samples = [
            sample
            for (folder, table), content in zip(tables.items(), halves, strict=True)
            for sample in _annotated(folder, table, variable(table, content, "annotations"), "fname", class_names)
        ]
        merged = "official train and test halves merged"
        return merged if len(tables) == 2 else "official train half only, cars_test/ is absent", samples

    def _test_annotations(self) -> Path:
        # The labels of the test half came later, as a file of their own, which many keep beside devkit/.
        places = [folder / _TEST_ANNOTATIONS for folder in (self.root / "devkit", self.root)]
        labelled = next((place for place in places if place.exists()), None)
        if labelled is None:
            wanted = (f"devkit/{_TEST_ANNOTATIONS}", _TEST_ANNOTATIONS)
            instead = next(filter(None, (where_instead(self.root, path) for path in wanted)), "")
            raise DataError(
                f"data set cars: {self.root / 'cars_test'} is there but {places[0]} is not{instead}; "
                "cars_test_annos.mat has no labels, and without them it cannot be split by class: add the file "
                f"({_PUBLISHED}) or move cars_test/ away"
            )
        return labelled

    def read(self, sample: Sample) -> bytes:
        """The JPEG file as it is."""
        return read_image_file(self.root, sample.source)


def _annotated(
    folder: str, table: Path, annotations: list[Any], path_field: str, class_names: list[str]
) -> list[Sample]:
    """The images of one annotation file; folder: what its paths are relative to, within the data set."""
    samples = []
    for row, entry in enumerate(annotations, start=1):
        values = entry if isinstance(entry, dict) else {}
        wanted = (path_field, "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")
        if missing := [field for field in wanted if field not in values]:
            without_labels = missing == ["class"]
            hint = f"; this is not {_TEST_ANNOTATIONS}, the file with labels" if without_labels else ""
            raise DataError(f"{table}: annotation {row}: has no {missing[0]}{hint}")
        try:
            path = relative_path(folder + str(values[path_field]))
            label = whole(values["class"])
            # The devkit counts pixels from 1 and includes the last: a whole image of 196 × 96 is 1, 1, 196, 96.
            box = from_inclusive(*(coordinate(values[field]) for field in wanted[1:5]))
        except (TypeError, ValueError) as error:
            raise DataError(f"{table}: annotation {row}: {error}") from None
        if not 1 <= label <= len(class_names):
            raise DataError(
                f"{table}: annotation {row} ({values[path_field]}): class {label} is not in 1–{len(class_names)}"
            )
        samples.append(
            Sample(
                id=str(PurePosixPath(path).with_suffix("")),
                split="train" if label <= _LAST_TRAIN_CLASS else "test",
                label=label - 1,
                class_name=class_names[label - 1],
                source=path,
                box=box,
                box_source="dataset",
                caption="",
            )
        )
    return samples

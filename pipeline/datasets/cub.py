"""CUB-200-2011 in its official layout; classes 1–100 train, 101–200 test (open-set retrieval)."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.datasets.base import DataError, Sample, check_open_set, first_of_each_split, limited
from pipeline.datasets.boxes import Box, coordinate, from_corner_and_size
from pipeline.datasets.image_files import read_image_file, relative_path, require_layout
from pipeline.datasets.text_table import Line, read_table

LAYOUT = "images/, images.txt, image_class_labels.txt, bounding_boxes.txt and classes.txt"
CUB_FILES = ("images.txt", "image_class_labels.txt", "bounding_boxes.txt", "classes.txt", "images")
_PUBLISHED = "CUB-200-2011 (Wah et al., 2011), https://www.vision.caltech.edu/datasets/cub_200_2011"
_PROTOCOL = "classes 1–100 train, classes 101–200 test; the official split is not used"
_LAST_TRAIN_CLASS = 100
_CLASSES = range(1, 201)


@dataclass(frozen=True)
class ListedImage:
    """An image as the text files of CUB and NABirds describe it; path: relative to `images/`."""

    id: str
    path: str
    class_id: int
    box: Box


class CubDataset:
    """All images, split by class. `train_test_split.txt`, `parts/` and `attributes/` are not read and may be absent.

    Raises DataError naming the file and the line that is wrong.
    """

    name = "cub"
    superclass = "bird"

    def __init__(self, root: Path, limit: int | None = None):
        self.root = Path(root)
        self.protocol = limited(_PROTOCOL, limit)
        require_layout(self.name, self.root, CUB_FILES, LAYOUT, _PUBLISHED)
        class_names = read_classes(self.root / "classes.txt", _CLASSES)
        samples = [
            Sample(
                id=str(PurePosixPath(image.path).with_suffix("")),
                split="train" if image.class_id <= _LAST_TRAIN_CLASS else "test",
                label=image.class_id - 1,
                # 001.Black_footed_Albatross is how a folder is named, not how anybody would write it in a caption.
                class_name=re.sub(r"^\d+\.", "", class_names[image.class_id]).replace("_", " "),
                source=f"images/{image.path}",
                box=image.box,
                box_source="dataset",
                caption="",
            )
            for image in read_listed_images(self.root, class_names)
        ]
        self.samples: Sequence[Sample] = first_of_each_split(samples, limit)
        check_open_set(self.samples, f"data set {self.name} in {self.root}")

    def read(self, sample: Sample) -> bytes:
        """The image file as it is."""
        return read_image_file(self.root, sample.source)


def read_classes(path: Path, allowed: range | None = None) -> dict[int, str]:
    """`classes.txt`: class id and name, which may hold blanks. Ids must be in `allowed`, if given."""
    names: dict[int, str] = {}
    for line in read_table(path, ("class id", "class name"), last_is_text=True).values():
        class_id = line.whole_number(0, "class id")
        if allowed is not None and class_id not in allowed:
            raise line.error(f"class {class_id} is not in {allowed[0]}–{allowed[-1]}")
        if class_id in names:
            raise line.error(f"class {class_id} is listed already; each class may stand once")
        names[class_id] = line.fields[1]
    return names


def read_listed_images(root: Path, classes: Container[int]) -> list[ListedImage]:
    """`images.txt` joined with `image_class_labels.txt` and `bounding_boxes.txt`, in the order of `images.txt`.

    Boxes are x, y, width, height in pixels from the image's upper left corner. Raises DataError naming file and line
    for a path that leaves `images/`, an image without a label or a box or with two entries, and unknown ids.
    """
    images = read_table(root / "images.txt", ("image id", "path"), last_is_text=True)
    labels = _same_ids(images, read_table(root / "image_class_labels.txt", ("image id", "class id")))
    boxes = _same_ids(images, read_table(root / "bounding_boxes.txt", ("image id", "x", "y", "width", "height")))
    listed: list[ListedImage] = []
    seen: dict[str, Line] = {}
    for image_id, line in images.items():
        try:
            path = relative_path(line.fields[1])
        except ValueError as error:
            raise line.error(str(error)) from None
        if seen.setdefault(path, line) is not line:
            raise line.error(f"{path!r} is on line {seen[path].number} already; each image may stand once")
        class_id = labels[image_id].whole_number(1, "class id")
        if class_id not in classes:
            raise labels[image_id].error(f"class {class_id} is not in classes.txt")
        listed.append(ListedImage(image_id, path, class_id, _box(boxes[image_id])))
    return listed


def _same_ids(images: dict[str, Line], table: dict[str, Line]) -> dict[str, Line]:
    for image_id, line in table.items():
        if image_id not in images:
            raise line.error(f"image id {image_id!r} is not in images.txt; the files must be of one release")
    missing = next((line for image_id, line in images.items() if image_id not in table), None)
    if missing is not None:
        other = next(iter(table.values())).path
        raise DataError(
            f"{other}: has no line for image id {missing.fields[0]!r} ({missing.path} line {missing.number})"
        )
    return table


def _box(line: Line) -> Box:
    try:
        return from_corner_and_size(*(coordinate(field) for field in line.fields[1:]))
    except ValueError as error:
        raise line.error(f"{error}; expected image id, x, y, width, height") from None

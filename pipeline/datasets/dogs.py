"""Stanford Dogs in its official layout; classes 1–60 train, 61–120 test (open-set retrieval)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from xml.parsers import expat

from pipeline.datasets.base import DataError, Sample, check_open_set, first_of_each_split, limited
from pipeline.datasets.boxes import Box, area, coordinate
from pipeline.datasets.image_files import (
    IMAGE_SUFFIXES,
    is_housekeeping,
    read_image_file,
    relative_path,
    require_layout,
)
from pipeline.datasets.matlab import load_mats, variable, whole
from pipeline.datasets.text_table import line_error

_PUBLISHED = "Stanford Dogs (Khosla et al., 2011), http://vision.stanford.edu/aditya86/ImageNetDogs"
_LAYOUT = "Images/ (images.tar), Annotation/ (annotation.tar) and preferably lists/*.mat (lists.tar)"
_PROTOCOL = "official train and test lists merged; classes 1–60 train, classes 61–120 test"
_LAST_TRAIN_CLASS = 60
_CLASSES = 120
_LARGEST_ANNOTATION = 1_000_000  # bytes; an official one has about 500
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


class DogsDataset:
    """All images, split by class; the box is the largest of an image's dogs.

    Classes are numbered as in lists/*.mat; without the lists, by the sorted names of the 120 folders in Images/, which
    is the same order. Raises DataError naming the file and the entry or line that is wrong.
    """

    name = "dogs"
    superclass = "dog"

    def __init__(self, root: Path, limit: int | None = None):
        self.root = Path(root)
        self.protocol = limited(_PROTOCOL, limit)
        require_layout(self.name, self.root, ("Images", "Annotation"), _LAYOUT, _PUBLISHED)
        listed = first_of_each_split(self._listed(), limit)
        # Annotations are a file per image; those that --limit leaves out are not opened.
        self.samples: Sequence[Sample] = [replace(s, box=self._largest_box(s.id)) for s in listed]
        check_open_set(self.samples, f"data set {self.name} in {self.root}")

    def _listed(self) -> list[Sample]:
        lists = self.root / "lists"
        # The lists are an archive of their own, which some unpack beside Images/ rather than in lists/.
        for folder in (lists, self.root):
            if (folder / "file_list.mat").exists():
                return _from_lists([folder / "file_list.mat"])
            halves = [folder / "train_list.mat", folder / "test_list.mat"]
            present = [half.exists() for half in halves]
            if all(present):
                return _from_lists(halves)
            if any(present):
                raise DataError(
                    f"{halves[present.index(False)]}: missing, while its other half is there; unpack lists.tar again, "
                    f"from {_PUBLISHED}"
                )
        return self._from_folders()

    def _from_folders(self) -> list[Sample]:
        folders = sorted(p for p in (self.root / "Images").iterdir() if p.is_dir() and not is_housekeeping(p.name))
        if len(folders) != _CLASSES:
            raise DataError(
                f"{self.root / 'Images'}: has {len(folders)} of {_CLASSES} class folders and there is no lists/ "
                f"to number them by; add lists.tar or the missing folders, from {_PUBLISHED}"
            )
        return [
            _sample(f"{folder.name}/{image.name}", class_id)
            for class_id, folder in enumerate(folders, start=1)
            for image in sorted(folder.iterdir())
            if image.suffix.lower() in IMAGE_SUFFIXES
        ]

    def _largest_box(self, sample_id: str) -> Box:
        return max(read_annotation(self.root / "Annotation" / sample_id), key=area)

    def read(self, sample: Sample) -> bytes:
        """The image file as it is."""
        return read_image_file(self.root, sample.source)


def _from_lists(paths: list[Path]) -> list[Sample]:
    samples = []
    for path, content in zip(paths, load_mats(paths, ("file_list", "labels"), _PUBLISHED), strict=True):
        files, labels = variable(path, content, "file_list"), variable(path, content, "labels")
        if len(files) != len(labels):
            raise DataError(f"{path}: file_list has {len(files)} entries, labels has {len(labels)}")
        for entry, (file, label) in enumerate(zip(files, labels, strict=True), start=1):
            try:
                class_id, name = whole(label), relative_path(str(file))
            except ValueError as error:
                raise DataError(f"{path} entry {entry}: {error}") from None
            if not 1 <= class_id <= _CLASSES or "/" not in name:
                raise DataError(
                    f"{path} entry {entry}: expected a path like n02085620-Chihuahua/n02085620_10074.jpg and a class "
                    f"in 1–{_CLASSES}, found {name!r} and {class_id}"
                )
            samples.append(_sample(name, class_id))
    return samples


def _sample(name: str, class_id: int) -> Sample:
    return Sample(
        id=str(PurePosixPath(name).with_suffix("")),
        split="train" if class_id <= _LAST_TRAIN_CLASS else "test",
        label=class_id - 1,
        # n02085936-Maltese_dog: the WordNet id, then the name, which may hold hyphens of its own.
        class_name=name.split("/")[0].partition("-")[2].replace("_", " "),
        source=f"Images/{name}",
        box=None,
        box_source="dataset",
        caption="",
    )


def read_annotation(path: Path) -> list[Box]:
    """The boxes of one annotation file (XML in PASCAL VOC's form, without a suffix), at least one, in its order.

    Their corners are pixel edges counted from 0, as ImageNet's annotations are. Raises DataError naming the line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_ANNOTATION + 1)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; unpack annotation.tar again, from {_PUBLISHED}"
        ) from None
    if len(data) > _LARGEST_ANNOTATION:
        raise DataError(f"{path}: larger than {_LARGEST_ANNOTATION} bytes; this is no annotation of one image")
    reader = _BoxReader(path)
    try:
        reader.parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise line_error(path, reader.parser.CurrentLineNumber, f"not well-formed XML: {error}") from None
    if not reader.boxes:
        raise DataError(f"{path}: holds no object with a bndbox; expected one or more")
    return reader.boxes


class _BoxReader:
    """Collects annotation/object/bndbox; expat rather than a tree, because a tree no longer knows the lines."""

    def __init__(self, path: Path):
        self.path = path
        self.boxes: list[Box] = []
        self._elements: list[str] = []
        self._corners: dict[str, str] = {}
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.StartDoctypeDeclHandler = self._doctype

    def _doctype(self, *_: object) -> None:
        # Entities can make a small file expand without bound, and no official file declares any.
        raise self._error("declares a document type; no official annotation does")

    def _start(self, name: str, _: dict) -> None:
        self._elements.append(name)
        if self._elements == ["annotation", "object", "bndbox"]:
            self._corners = {}

    def _text(self, text: str) -> None:
        if len(self._elements) == 4 and self._elements[:3] == ["annotation", "object", "bndbox"]:
            self._corners[self._elements[-1]] = self._corners.get(self._elements[-1], "") + text

    def _end(self, name: str) -> None:
        try:
            if self._elements == ["annotation", "object", "bndbox"]:
                if missing := [corner for corner in _CORNERS if corner not in self._corners]:
                    raise self._error(f"bndbox without {missing[0]}; expected {', '.join(_CORNERS)}")
                x0, y0, x1, y1 = (coordinate(self._corners[corner].strip()) for corner in _CORNERS)
                self.boxes.append((x0, y0, x1, y1))
        except ValueError as error:
            raise self._error(f"{error} in a bndbox") from None
        self._elements.pop()

    def _error(self, problem: str) -> DataError:
        return line_error(self.path, self.parser.CurrentLineNumber, problem)

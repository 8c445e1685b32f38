"""Any folder of images: a folder per class, optionally train/, test/ and unlabeled/ above, optionally metadata."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.datasets.base import SPLITS, DataError, Sample, check_open_set, first_of_each_split, limited
from pipeline.datasets.boxes import Box
from pipeline.datasets.class_split import ClassSplit, in_class_order
from pipeline.datasets.folder_metadata import NOTHING, find_metadata, read_metadata
from pipeline.datasets.image_files import IMAGE_SUFFIXES, read_image_file

# Other people's words for a held-out part; taken for class names they would give a wrong protocol without a word.
_AMBIGUOUS_SPLITS = frozenset({"val", "valid", "validation", "dev"})
_LEFT_OUT = frozenset({"__MACOSX"})


@dataclass(frozen=True)
class _Found:
    """An image before its classes are numbered; split is None where neither a folder nor metadata says it."""

    source: str
    split: str | None
    class_name: str | None
    box: Box | None
    caption: str


class FolderDataset:
    """Images in `root/class/…/` or `root/train|test|unlabeled/class/…/`, with optional metadata (`read_metadata`).

    Splits come from train/ and test/ or from metadata; where neither says them, or the user chooses with
    `train_classes` (names) or `train_ratio`, from the classes: all labelled images are put together and split by class,
    by default half and half in class order. Images without a class, and those of unlabeled/, are the split
    `unlabeled`. A class without images is no class. Raises DataError naming the file that is wrong.
    """

    name = "folder"

    def __init__(
        self,
        root: Path,
        limit: int | None = None,
        train_classes: Sequence[str] | None = None,
        train_ratio: float | None = None,
        superclass: str = "object",
    ):
        self.root = Path(root)
        self.superclass = superclass
        chosen = ClassSplit(None if train_classes is None else tuple(train_classes), train_ratio)
        if not self.root.is_dir():
            raise DataError(
                f"data set folder: {self.root} is not a folder; it must contain a folder of images per class"
            )
        found = self._found()
        if not found:
            raise DataError(
                f"data set folder: {self.root} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                "it must contain a folder of images per class"
            )
        labelled = [f for f in found if f.split != "unlabeled"]
        names = in_class_order({f.class_name for f in labelled if f.class_name is not None})
        given = [f.split is not None for f in labelled]
        if chosen != ClassSplit() or not any(given):
            train, rule = chosen.choose(names, f"data set folder in {self.root}")
            splits = {name: "train" if name in train else "test" for name in names}
        elif all(given):
            splits, rule = {}, "train and test as given"
            self._check_given(labelled)
        else:
            raise DataError(
                f"{self.root / labelled[given.index(False)].source}: has no split while others have one; give every "
                "image one in the metadata, or none, or choose with --train-classes or --train-ratio"
            )
        self.protocol = limited(rule, limit)
        labels = {name: k for k, name in enumerate(names)}
        samples = [_sample(f, splits, labels) for f in found]
        self.samples: Sequence[Sample] = first_of_each_split(samples, limit)
        check_open_set(self.samples, f"data set folder in {self.root}")

    def _check_given(self, labelled: list[_Found]) -> None:
        first: dict[str | None, _Found] = {}
        for image in labelled:
            other = first.setdefault(image.class_name, image)
            if other.split != image.split:
                raise DataError(
                    f"data set folder in {self.root}: class {image.class_name!r} is in {other.split} "
                    f"({other.source}) and in {image.split} ({image.source}), but test classes must be unseen; "
                    "use --train-ratio 0.5 (or --train-classes) to put both together and split by class"
                )

    def _found(self) -> list[_Found]:
        sources = sorted(_image_sources(self.root))
        with_splits = self._has_split_folders(sources)
        records = read_metadata(self.root)
        if with_splits:
            for part in SPLITS:
                records |= {f"{part}/{name}": row for name, row in read_metadata(self.root / part).items()}
        found = []
        # Listed files that are not on disk stay in: the scan sets them aside and says so.
        for source in sorted({*sources, *records}):
            row = records.get(source, NOTHING)
            folders = PurePosixPath(source).parts[:-1]
            split = row.split or (folders[0] if with_splits and folders and folders[0] in SPLITS else None)
            below = folders[1:] if with_splits else folders
            class_name = row.class_name or (below[0] if below else None)
            if class_name is None and split not in (None, "unlabeled"):
                raise DataError(
                    f"{row.where or self.root / source}: {source} is in split {split} but has no class; put it into a "
                    "folder named after its class or give it a class_name in the metadata"
                )
            if class_name is None or split == "unlabeled":
                found.append(_Found(source, "unlabeled", None, row.box, row.caption))
            else:
                found.append(_Found(source, split, class_name, row.box, row.caption))
        return found

    def _has_split_folders(self, sources: list[str]) -> bool:
        tops = {source.split("/")[0] for source in sources if "/" in source}
        if "train" not in tops:
            return False
        if ambiguous := sorted(tops & _AMBIGUOUS_SPLITS):
            raise DataError(
                f"{self.root / ambiguous[0]}: beside train/, is this a class or a split? Splits are "
                f"{', '.join(SPLITS)}; rename it to test or unlabeled, or move it away"
            )
        if not tops <= set(SPLITS):
            return False  # a class that is called train, among others
        direct = next((s for s in sources if s.startswith("train/") and s.count("/") == 1), None)
        return direct is None or "test" in tops or find_metadata(self.root / "train") is not None

    def read(self, sample: Sample) -> bytes:
        """The image file as it is."""
        return read_image_file(self.root, sample.source)


def _image_sources(root: Path) -> Iterator[str]:
    """Paths of all image files below a folder, relative to it. Hidden files and folders are left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _LEFT_OUT)
        linked = next((name for name in folders if (Path(folder) / name).is_symlink()), None)
        if linked is not None:
            raise DataError(f"{Path(folder) / linked}: a link to a folder, which is not followed; put a copy there")
        for name in files:
            if name.startswith(".") or Path(name).suffix.lower() not in IMAGE_SUFFIXES:
                continue
            source = (Path(folder) / name).relative_to(root).as_posix()
            try:
                source.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(f"{root}: the file name {os.fsencode(source)!r} is not UTF-8; rename it") from None
            yield source


def _sample(image: _Found, splits: dict[str, str], labels: dict[str, int]) -> Sample:
    class_name = image.class_name or ""
    return Sample(
        # With its suffix, because a.jpg and a.png are two images.
        id=image.source,
        split=splits.get(class_name) or image.split or "unlabeled",
        label=labels.get(class_name, -1),
        class_name=class_name,
        source=image.source,
        box=image.box,
        box_source="dataset",
        caption=image.caption,
    )

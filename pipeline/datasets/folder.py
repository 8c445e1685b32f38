"""Any folder of images: a folder per class, optionally train/, test/ and unlabeled/ above, optionally metadata."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.datasets.base import DataError, Sample, check_open_set, first_of_each_split, limited
from pipeline.datasets.boxes import Box
from pipeline.datasets.class_names import look_alikes, plain_class_name
from pipeline.datasets.class_split import ClassSplit, in_class_order
from pipeline.datasets.folder_layout import find_images, refuse_too_deep, split_folders
from pipeline.datasets.folder_metadata import NOTHING, read_metadata
from pipeline.datasets.image_files import IMAGE_SUFFIXES, read_image_file
from pipeline.datasets.split_words import is_split_word, split_of_word


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

    Splits come from folders that are called so (`split_words`) or from metadata; where neither says them, or the user
    chooses with `train_classes` (names) or `train_ratio`, from the classes: all labelled images are put together and
    split by class, by default half and half in class order. Images without a class, and those of unlabeled/, are the
    split `unlabeled`. A class without images is no class. Raises DataError naming the file that is wrong.
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
        self._remarks: list[str] = []
        found = self._found(chosen)
        if not found:
            instead = "".join(f"; {remark}" for remark in self._remarks)
            raise DataError(
                f"data set folder: {self.root} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                f"it must contain a folder of images per class{instead}"
            )
        labelled = [f for f in found if f.split != "unlabeled"]
        names = in_class_order({f.class_name for f in labelled if f.class_name is not None})
        splits, rule = self._splits(labelled, names, chosen)
        self.protocol = limited(rule, limit)
        labels = {name: k for k, name in enumerate(names)}
        samples = [_sample(f, splits, labels) for f in found]
        self._check_names(samples)
        self.samples: Sequence[Sample] = first_of_each_split(samples, limit)
        check_open_set(self.samples, f"data set folder in {self.root}")

    @property
    def remarks(self) -> Sequence[str]:
        """What was passed over or not read, and class names to look at, a line each."""
        return self._remarks

    def _splits(self, labelled: list[_Found], names: list[str], chosen: ClassSplit) -> tuple[dict[str, str], str]:
        """The split of each class, empty where every image has its own, and the rule as a line for the protocol."""
        if not names:
            raise DataError(
                f"data set folder: {self.root} has images but no class folders, so there is nothing to learn; put each "
                "image into a folder named after its class, or give it a class_name in a metadata.csv"
            )
        given = [f.split is not None for f in labelled]
        if chosen == ClassSplit() and all(given):
            self._check_given(labelled)
            return {}, "train and test as given"
        if chosen == ClassSplit() and any(given):
            raise DataError(
                f"{self.root / labelled[given.index(False)].source}: has no split while others have one; give every "
                "image one in the metadata, or none, or choose with --train-classes or --train-ratio"
            )
        inside = self.root / names[0]
        if len(names) == 1:
            instead = f"; if the classes are the folders in it, give --data {inside}" if inside.is_dir() else ""
            raise DataError(
                f"data set folder: {self.root} has only one class, {names[0]!r}, and classes to train and to test on "
                f"are needed{instead}"
            )
        train, rule = chosen.choose(names, f"data set folder in {self.root}")
        return {name: "train" if name in train else "test" for name in names}, rule

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

    def _check_names(self, samples: Sequence[Sample]) -> None:
        """Refuse classes in train and test that are called the same but for form, case or blanks; say others."""
        of = {s.class_name: s for s in samples if s.class_name}
        for group in look_alikes(of):
            named = " and ".join(f"{name!r} ({of[name].split}: {of[name].source})" for name in group)
            problem = f"classes {named} differ only in case, blanks or Unicode form"
            if len({of[name].split for name in group}) > 1:
                raise DataError(
                    f"data set folder in {self.root}: {problem}, but test classes must be unseen; give them one name "
                    "if they are one class, or clearly different ones"
                )
            self._remarks.append(f"{problem}; are they one class?")

    def _found(self, chosen: ClassSplit) -> list[_Found]:
        images = find_images(self.root)
        self._remarks += images.remarks
        records = read_metadata(self.root, self._remarks.append)
        for folder in sorted({source.split("/")[0] for source in images.sources if "/" in source}):
            if is_split_word(folder):
                rows = read_metadata(self.root / folder, self._remarks.append)
                records |= {f"{folder}/{name}": row for name, row in rows.items()}
        # Listed files that are not on disk stay in: the scan sets them aside and says so.
        sources = sorted({*images.sources, *records})
        parts = split_folders(self.root, sources, records, chosen)
        refuse_too_deep(self.root, parts, [s for s in sources if not records.get(s, NOTHING).class_name])
        found = []
        for source in sources:
            row = records.get(source, NOTHING)
            folders = PurePosixPath(source).parts[:-1]
            in_part = bool(folders) and folders[0] in parts
            split = row.split or (split_of_word(folders[0]) if in_part else None)
            below = folders[1:] if in_part else folders
            class_name = row.class_name or (plain_class_name(below[0]) if below else None)
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

    def read(self, sample: Sample) -> bytes:
        """The image file as it is."""
        return read_image_file(self.root, sample.source)


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

"""What the folders of a data set of one's own hold: which files are images, which folders are splits."""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.datasets.base import SPLITS, DataError
from pipeline.datasets.class_names import look_alike_key
from pipeline.datasets.class_split import ClassSplit
from pipeline.datasets.folder_metadata import METADATA_FILES, NOTHING, ImageMetadata
from pipeline.datasets.image_files import IMAGE_SUFFIXES, is_housekeeping
from pipeline.datasets.split_words import is_split_word, named_like_splits, split_of_word

_NAMED = 8


@dataclass(frozen=True)
class FoundImages:
    """Paths of image files relative to the folder; passed_over: how many other files there are, by suffix."""

    sources: list[str]
    passed_over: Counter[str]

    @property
    def remarks(self) -> list[str]:
        """A line about the files that were passed over, if there are any."""
        if not self.passed_over:
            return []
        kinds = self.passed_over.most_common()
        named = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in kinds[:_NAMED])
        more = f" and {len(kinds) - _NAMED} more kinds" if len(kinds) > _NAMED else ""
        return [
            f"passed over {self.passed_over.total()} files that are no images by their suffix: {named}{more}; convert "
            "any photographs among them, for example to .png"
        ]


def find_images(root: Path) -> FoundImages:
    """All images below a folder; hidden and housekeeping files and folders are as if they were not there.

    Raises DataError for a folder that cannot be read, a link to a folder, and a file name that is not UTF-8.
    """
    sources: list[str] = []
    passed_over: Counter[str] = Counter()
    for folder, folders, files in os.walk(root, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not is_housekeeping(name))
        linked = next((name for name in folders if (Path(folder) / name).is_symlink()), None)
        if linked is not None:
            raise DataError(f"{Path(folder) / linked}: a link to a folder, which is not followed; put a copy there")
        for name in files:
            if is_housekeeping(name):
                continue
            suffix = Path(name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                source = (Path(folder) / name).relative_to(root).as_posix()
                _check_utf8(root, source)
                sources.append(source)
            elif name not in METADATA_FILES:
                passed_over[suffix.encode("utf-8", "replace").decode()] += 1
    return FoundImages(sources, passed_over)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}")


def _check_utf8(root: Path, source: str) -> None:
    try:
        source.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{root}: the file name {os.fsencode(source)!r} is not UTF-8; rename it") from None


def split_folders(
    root: Path, sources: Sequence[str], records: Mapping[str, ImageMetadata], chosen: ClassSplit
) -> frozenset[str]:
    """Those of the folders directly in `root` that are splits rather than classes.

    chosen: what the user says about classes; it settles what a folder cannot: beside other classes, `train` is a class,
    and the classes in `query` and `gallery` are put together. Without it, a folder that is called as a part of a data
    set is a split if that is all there is, and raises DataError where it could also be a class or several splits.
    """
    undecided = [s for s in sources if "/" in s and not _settled(records.get(s, NOTHING))]
    tops = sorted({_top(source) for source in undecided})
    unlabeled = {top for top in tops if split_of_word(top) == "unlabeled"}
    words = {top for top in tops if is_split_word(top)}
    classes = [top for top in tops if top not in words]
    if chosen.train_classes is None:
        _refuse_named_like_splits(root, {_top(s) for s in undecided if not records.get(s, NOTHING).class_name} - words)
    if chosen != ClassSplit():
        named = {look_alike_key(name) for name in chosen.train_classes or ()}
        inside = (records.get(s, NOTHING).class_name or s.count("/") > 1 for s in undecided if _top(s) not in unlabeled)
        if classes or any(look_alike_key(top) in named for top in words) or not all(inside):
            return frozenset(top for top in unlabeled if look_alike_key(top) not in named)
        return frozenset(words)
    unclear = sorted(top for top in words if split_of_word(top) is None)
    if classes:
        unclear += sorted(words - unlabeled - {*unclear})
    if unclear:
        beside = next((top for top in tops if split_of_word(top) == "train" and top != unclear[0]), None)
        beside = beside or next(iter(classes), None)
        raise DataError(
            f"{root / unclear[0]}: {f'beside {beside}/, ' if beside else ''}is this a class or a split? Splits are "
            f"{', '.join(SPLITS)}; rename it to one of them and move all classes into such folders, or move it away; "
            "or say which classes train with --train-ratio 0.5 or --train-classes"
        )
    return frozenset(words)


def _refuse_named_like_splits(root: Path, tops: Collection[str]) -> None:
    alike = named_like_splits(tops)
    if alike:
        raise DataError(
            f"{root}: {alike[0]} and {alike[1]} are called like splits, not like classes; rename those that hold "
            f"classes to {', '.join(SPLITS)}, or give --data {root / alike[0]} if that alone holds them; if they "
            "are classes, say which train with --train-classes"
        )


def refuse_too_deep(root: Path, parts: Collection[str], sources: Sequence[str]) -> None:
    """Raise DataError where the classes of all `parts` lie one folder deeper than they should: `train/train/wren/`.

    sources: of images whose class is the folder that they are in. One class alone in a split is the folder of the
    classes where it is called like a split, or the same in each, and all its images lie in folders of their own.
    """
    inside: dict[str, set[str]] = {part: set() for part in parts if split_of_word(part) != "unlabeled"}
    deep = True
    for source in sources:
        folders = source.split("/")[:-1]
        if len(folders) > 1 and folders[0] in inside:
            inside[folders[0]].add(folders[1])
            deep = deep and len(folders) > 2
    alone = [name for names in inside.values() if len(names) == 1 for name in names]
    if not (deep and alone and len(alone) == len(inside)):
        return
    if len(alone) > 1 and (all(map(is_split_word, alone)) or len({*alone}) == 1 or named_like_splits(alone)):
        part = next(iter(inside))
        raise DataError(
            f"{root / part / alone[0]}: the folders of the classes lie one folder too deep; move what is in it up into "
            f"{root / part}, and so in every split"
        )


def _top(source: str) -> str:
    return source.split("/")[0]


def _settled(row: ImageMetadata) -> bool:
    """Whether metadata says all that a folder's name could."""
    return row.split is not None and (row.class_name is not None or row.split == "unlabeled")

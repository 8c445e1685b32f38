"""Folder names that are other people's words for a split, which must not become classes without a word."""

import re
from collections.abc import Collection

_SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "unlabeled": "unlabeled",
    "unlabelled": "unlabeled",
}
# A part held out for something. Which of our splits it stands for, only its owner knows.
_UNDECIDED = frozenset(
    {"dev", "eval", "evaluation", "gallery", "holdout", "query", "trainval", "val", "valid", "validation"}
)

# Words that name a split beside another one of them, in folders whose names are equal but for them.
_IN_NAMES = frozenset(
    {*_SPLITS, *_UNDECIDED, "base", "known", "novel", "seen", "te", "tr", "trn", "ts", "tst", "unknown", "unseen"}
)
_PART_OF_NAME = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^A-Za-z]+")  # imagesTr is images and Tr


def split_of_word(word: str) -> str | None:
    """The split that a word names, whatever its case: `Training` is train; None if it names none of ours."""
    return _SPLITS.get(word.strip().casefold())


def is_split_word(word: str) -> bool:
    """Say whether a word names a part of a data set, ours (`Train`) or one that could be several (`query`)."""
    return split_of_word(word) is not None or word.strip().casefold() in _UNDECIDED


def named_like_splits(names: Collection[str]) -> list[str]:
    """Names that are equal but for words for splits in them, sorted: `cars_train`, `cars_test`; `imagesTr`, `imagesTs`.

    One `bullet_train` among classes is none of them.
    """
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        parts = tuple(part.casefold() for part in _PART_OF_NAME.findall(name.strip()))
        for at, part in enumerate(parts):
            if part in _IN_NAMES:
                groups.setdefault((*parts[:at], "", *parts[at + 1 :]), {})[name] = part
    return sorted({name for words in groups.values() if len({*words.values()}) > 1 for name in words})

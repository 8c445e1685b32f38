"""Folder names that are other people's words for a split, which must not become classes without a word."""

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


def split_of_word(word: str) -> str | None:
    """The split that a word names, whatever its case: `Training` is train; None if it names none of ours."""
    return _SPLITS.get(word.strip().casefold())


def is_split_word(word: str) -> bool:
    """Say whether a word names a part of a data set, ours (`Train`) or one that could be several (`query`)."""
    return split_of_word(word) is not None or word.strip().casefold() in _UNDECIDED

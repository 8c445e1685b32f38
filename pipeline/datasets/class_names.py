"""Class names as people and file systems write them: one name, in whatever Unicode form, case and blanks."""

import unicodedata
from collections.abc import Iterable


def plain_class_name(text: str) -> str:
    """A class name in Unicode NFC, as macOS would not write it, without blanks around it."""
    return unicodedata.normalize("NFC", text).strip()


def look_alike_key(name: str) -> str:
    """What is equal for names that differ only in Unicode form, case, blanks (also `_`), dashes or what nobody sees."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return "".join(_seen(character) for character in folded)


def _seen(character: str) -> str:
    """A character as people see it: none for a blank, an underscore or a control, one dash for all dashes."""
    category = unicodedata.category(character)
    if category == "Pd":
        return "-"
    return "" if character.isspace() or character == "_" or category in ("Cf", "Cc") else character


def look_alikes(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of different names that differ only in Unicode form, case or blanks, each group and all of them sorted."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(look_alike_key(name), set()).add(name)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def find_class(text: str, names: Iterable[str]) -> str | None:
    """The class among `names` that a user means: of this name, else the only one that looks like it, else None."""
    name, known = plain_class_name(text), set(names)
    if name in known:
        return name
    similar = [other for other in known if look_alike_key(other) == look_alike_key(name)]
    return similar[0] if len(similar) == 1 else None

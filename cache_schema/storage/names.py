"""Names of files in places that answer as they like: only what can lie inside the folder it was listed in."""

import re
import unicodedata

from cache_schema.errors import CacheCorrupt, printable

_MAX_NAME = 1024
_DRIVE = re.compile(r"[A-Za-z]:")


def is_inside(name: str) -> bool:
    """Say whether a name is relative, parts joined by `/`, and stays inside its folder on any system."""
    parts = name.split("/")
    return (
        len(name) <= _MAX_NAME
        and all(part not in ("", ".", "..") for part in parts)
        and "\\" not in name
        and not _DRIVE.match(name)
        and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)
    )


def check_listed(name: str, where: str) -> str:
    """Return a listed name; raises CacheCorrupt where it would lead out of the folder at `where`."""
    if not is_inside(name):
        raise CacheCorrupt(f"{where} lists {printable(name)[:200]!r}, which is not the name of a file inside it")
    return name

"""What caches are at a place: read from the caches themselves, so that no list can be wrong or lost."""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cache_schema.errors import CacheError, CacheNotFound, CacheRequestError
from cache_schema.format.card import format_bytes, format_encoding
from cache_schema.format.journal import JOURNAL_FOLDER, committed
from cache_schema.format.manifest import Manifest
from cache_schema.format.manifest_file import MANIFEST_NAME, load_manifest
from cache_schema.sharing.push import CLAIM_NAME
from cache_schema.sharing.transfer import delete_all, sizes_of
from cache_schema.storage.folder import Folder
from cache_schema.storage.local import local_folder
from cache_schema.storage.places import folder_at, inside, is_remote

VARIABLE = "DIT_CACHE_REMOTE"
_READERS = 16
COLUMNS = (
    "name",
    "data set",
    "teacher",
    "LoRA",
    "curriculum",
    "taps",
    "encoding",
    "size",
    "owner",
    "built",
    "state",
    "id",
)


@dataclass(frozen=True)
class Entry:
    """A cache at a place: its name there, its URL, and its manifest or, where that cannot be read, why."""

    name: str
    url: str
    manifest: Manifest | None
    problem: str = ""

    def row(self) -> dict[str, str]:
        """Return what a table says of it, by column."""
        manifest = self.manifest
        if manifest is None:
            return {**dict.fromkeys(COLUMNS, ""), "name": self.name, "state": self.problem}
        teacher, curriculum = manifest.teacher, manifest.curriculum
        size = (manifest.bytes_features or 0) + (manifest.bytes_images or 0)
        part = " (part)" if manifest.provenance.pulled else ""
        return {
            "name": self.name,
            "data set": f"{manifest.dataset.name}, {manifest.dataset.feature_rows} images",
            "teacher": f"{teacher.family} {teacher.source.rpartition('/')[2]}",
            "LoRA": (teacher.lora_digest or "none")[:8],
            "curriculum": f"{','.join(map(str, curriculum.timesteps))} of {curriculum.num_steps}",
            "taps": ",".join(tap.name for tap in manifest.taps),
            "encoding": format_encoding(manifest.encoding).replace(", compression none", ""),
            "size": format_bytes(size) if manifest.sealed else "",
            "owner": manifest.provenance.owner or "",
            "built": (manifest.provenance.created or "")[:10],
            "state": ("sealed" if manifest.sealed else "incomplete") + part,
            "id": manifest.cache_id[:12],
        }


def prefix_of(url: str | None) -> str:
    """Return the place to look at: the one given, or that of the environment; raises CacheRequestError for neither."""
    found = url or os.environ.get(VARIABLE)
    if not found:
        raise CacheRequestError(f"name a place, for example s3://team/caches, or set {VARIABLE}")
    return found.rstrip("/")


def catalogue(prefix: str) -> list[Entry]:
    """Return the caches one level below a prefix, by name, and the one at the prefix itself, if it is one."""
    folder = folder_at(prefix)
    names = folder.names()
    if MANIFEST_NAME in names:
        return [_entry(prefix.rpartition("/")[2], prefix)]
    with ThreadPoolExecutor(_READERS) as pool:
        entries = pool.map(lambda name: _entry(name, inside(prefix, name)), sorted(names))
        return [entry for entry in entries if entry.problem != _NONE]


_NONE = "no cache"
# Where runs say what they read: `dit-train` when it begins and when it is done, `dit-cache run`.
_OF_RUNS = ("config.json", "caches.json", "result.json", "run.json")


def _entry(name: str, url: str) -> Entry:
    try:
        return Entry(name, url, load_manifest(folder_at(url)))
    except CacheNotFound:
        return Entry(name, url, None, "being pushed" if folder_at(url).size(CLAIM_NAME) else _NONE)
    except CacheError as error:
        return Entry(name, url, None, f"cannot be read: {error}")


def matching(entries: Iterable[Entry], words: Iterable[str]) -> Iterator[Entry]:
    """Yield the caches that every word applies to: part of a value, or `column=part of its value`.

    Raises CacheRequestError for a column that there is not.
    """
    wanted = [_parse_word(word) for word in words]
    for entry in entries:
        row = entry.row()
        if all(
            any(text.lower() in value.lower() for name, value in row.items() if column in (None, name))
            for column, text in wanted
        ):
            yield entry


def _parse_word(word: str) -> tuple[str | None, str]:
    column, equals, text = word.partition("=")
    if not equals:
        return None, word
    known = {name.lower().replace(" ", ""): name for name in COLUMNS}
    if column.lower().replace(" ", "") not in known:
        raise CacheRequestError(f"there is no column {column!r}; there are {', '.join(known)}")
    return known[column.lower().replace(" ", "")], text


def table(entries: Iterable[Entry]) -> str:
    """Return caches as a table for people, columns aligned."""
    rows = [entry.row() for entry in entries]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in COLUMNS}
    lines = [{name: name for name in COLUMNS}, *rows]
    return "\n".join("  ".join(line[name].ljust(widths[name]) for name in COLUMNS).rstrip() for line in lines)


def find_built(cache_id: str, label: str) -> str | None:
    """Return the URL of a sealed cache with this id at the place of the environment, None where it is not known."""
    prefix = os.environ.get(VARIABLE)
    if not prefix:
        return None
    url = f"{prefix.rstrip('/')}/{label}"
    try:
        found = load_manifest(folder_at(url))
    except CacheNotFound:
        return None
    return url if found.cache_id == cache_id and found.sealed else None


def removable(url: str) -> list[str]:
    """Return the files of the cache at a URL, as `files_of`: a whole one, or what is left of one or not yet there.

    Raises CacheNotFound where there is none, so that nothing else is removed by mistake.
    """
    folder = folder_at(url)
    if not folder.exists(MANIFEST_NAME) and not folder.exists(CLAIM_NAME) and not any(committed(folder)):
        raise CacheNotFound(f"no cache at {url}: nothing is removed")
    return files_of(folder)


def remove(url: str) -> int:
    """Remove the cache at a URL and return how many files that were; it stops being a cache first.

    Raises as `removable` does.
    """
    names = removable(url)
    delete_all(folder_at(url), names)
    return len(names)


def files_of(folder: Folder) -> list[str]:
    """Return the files of a cache, manifest first; raises CacheRequestError where other caches lie in its folder."""
    # The journal last: what an interruption leaves can be told from other things.
    names = sorted(
        sizes_of(folder), key=lambda name: (name != MANIFEST_NAME, name.startswith(f"{JOURNAL_FOLDER}/"), name)
    )
    inside = [name for name in names if name.endswith(f"/{MANIFEST_NAME}")]
    if inside:
        raise CacheRequestError(f"{folder} holds other caches ({inside[0]}): name one of them")
    return names


def unused(entries: Iterable[Entry], runs: Path) -> list[Entry]:
    """Return the sealed caches that no run below the folder `runs` refers to, be it finished or not.

    Whatever a run says that is the id, the URL or the path of a cache counts. A path may be relative to here, or to a
    folder that the run lies in.
    """
    entries = list(entries)
    any_here = not all(is_remote(entry.url) for entry in entries)
    used: set[str] = set()
    relative: set[tuple[Path, str]] = set()
    for path in (path for name in _OF_RUNS for path in runs.rglob(name)):
        words = _words(path)
        urls = {word for word in words if "://" in word}
        used |= words | {_place(url) for url in urls}
        if any_here:
            folders = (Path.cwd(), *path.absolute().parents)
            relative |= {(folder, word) for folder in folders for word in words - urls}
    used |= {os.path.realpath(folder / word) for folder, word in relative}
    return [
        entry
        for entry in entries
        if entry.manifest is not None
        and entry.manifest.sealed
        and used.isdisjoint({entry.manifest.cache_id, entry.url.rstrip("/"), _place(entry.url)})
    ]


def _words(path: Path) -> set[str]:
    """Return all texts in a JSON file, at any depth; none of one that is damaged."""
    try:
        left = [json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError):
        return set()
    found = set()
    while left:
        value = left.pop()
        if isinstance(value, str):
            found.add(value.rstrip("/"))
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value
    return {word for word in found if word and "\0" not in word}


def _place(url: str) -> str:
    """Return the one name of a place: of a folder here its path without links."""
    return url.rstrip("/") if is_remote(url) else os.path.realpath(local_folder(url).path)

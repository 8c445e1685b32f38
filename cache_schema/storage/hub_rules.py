"""The rules by which a repository of the Hugging Face Hub must be laid out, held against a cache before it is sent.

Source: the Hub's documentation on storage limits ("repository limitations and recommendations").
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from cache_schema.errors import CacheRequestError

MOST_FILES = 100_000  # in a repository
MOST_IN_A_FOLDER = 10_000  # files and folders
LARGEST_FILE = 20_000_000_000  # bytes
FILES_A_COMMIT = 99  # added, replaced or removed


def check_layout(url: str, files: Mapping[str, int], others: Iterable[str] = ()) -> None:
    """Raise CacheRequestError where files, by name and size in bytes, may not lie together in a repository.

    `others` are names that are there already.
    """
    fewer = "`dit-cache convert --samples-per-shard` makes a copy with fewer, larger files"
    for name, size in files.items():
        if size >= LARGEST_FILE:
            raise CacheRequestError(
                f"{url}: {name} has {size / 1e9:.1f} GB, and the Hub takes files below 20 GB; `dit-cache convert "
                "--samples-per-shard` makes a copy with smaller ones"
            )
    names = files.keys() | set(others)
    if len(names) >= MOST_FILES:
        raise CacheRequestError(
            f"{url} would hold {len(names)} files, and the Hub takes fewer than 100 000 a repository; {fewer}, or "
            "choose another repository"
        )
    entries: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        folder, _, entry = name.rpartition("/")
        while entry:
            entries[folder].add(entry)
            folder, _, entry = folder.rpartition("/")
    for folder, found in sorted(entries.items()):
        if len(found) >= MOST_IN_A_FOLDER:
            raise CacheRequestError(
                f"{url}: {folder or 'its top folder'} would hold {len(found)} files, and the Hub takes fewer than "
                f"10 000 a folder; {fewer}"
            )

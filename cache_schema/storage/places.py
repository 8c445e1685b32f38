"""From a path or a URL to the folder that it names."""

import os
from collections.abc import Callable
from urllib.parse import urlsplit

from cache_schema.errors import CacheError
from cache_schema.storage.folder import Folder
from cache_schema.storage.local import local_folder
from cache_schema.storage.remote import Place, RemoteFolder

Location = str | os.PathLike[str]


def _object_store(url: str) -> Place:
    from cache_schema.storage.object_store import ObjectStorePlace

    return ObjectStorePlace(url)


def _http(url: str) -> Place:
    from cache_schema.storage.http import HttpPlace

    return HttpPlace(url)


def _sftp(url: str) -> Place:
    from cache_schema.storage.sftp import SftpPlace

    return SftpPlace(url)


def _hub(url: str) -> Place:
    from cache_schema.storage.hub import HubPlace

    return HubPlace(url)


_PLACES: dict[str, Callable[[str], Place]] = {
    "s3": _object_store,
    "gs": _object_store,
    "az": _object_store,
    "http": _http,
    "https": _http,
    "sftp": _sftp,
    "hf": _hub,
}


def is_remote(location: Location) -> bool:
    """Say whether this is a URL of another place than this machine's files."""
    scheme, separator, _ = os.fspath(location).partition("://")
    return bool(separator) and scheme.lower() != "file"


def inside(location: Location, name: str) -> str:
    """Return where a folder inside another one is; in URLs a % of its name is written %25."""
    text = os.fspath(location)
    return f"{text}/{name.replace('%', '%25') if '://' in text else name}"


def folder_at(location: Location) -> Folder:
    """Return the folder at a path or a URL; raises CacheError for a URL of no known kind, or with credentials in it."""
    text = os.fspath(location)
    if not is_remote(text):
        return local_folder(text)
    scheme, _, rest = text.partition("://")
    scheme = scheme.lower()
    text = f"{scheme}://{rest}"
    if scheme not in _PLACES:
        raise CacheError(f"{scheme}:// is no kind of place known here; there are file, {', '.join(_PLACES)}")
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise CacheError(f"this {scheme}:// URL cannot be read ({error}); write {scheme}://HOST/PATH") from None
    if parts.password is not None or (parts.username is not None and scheme != "sftp"):
        # The URL would be printed, saved with runs and seen in the list of processes.
        raise CacheError(f"a {scheme}:// URL holds credentials; leave them where the tools of that place look for them")
    if parts.query or parts.fragment or not (parts.netloc or parts.path.strip("/")):
        raise CacheError(f"{scheme}:// URLs here are a host or bucket and a path, without ? and #")
    return RemoteFolder(text, _PLACES[scheme](text.rstrip("/")))

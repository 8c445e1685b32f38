"""Folders of a web server, read only: ranges of files, and the listings that servers make of folders.

A server may send to another path of its own, but to no other host: whoever runs it could otherwise have this machine
read what only this machine can reach.
"""

import functools
import netrc
import os
import re
import time
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from cache_schema.errors import CacheCorrupt, CacheError, CacheStorageError, CacheUnreachable
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.extras import required
from cache_schema.storage.names import check_listed
from cache_schema.storage.remote import ChangedWhileRead, Stat
from cache_schema.storage.retrying import Transient, stall

SCHEMES = ("http", "https")
_MAX_LISTING = 64 << 20
_MAX_FOLDERS = 100_000
_REDIRECTS = 5
_SLOWEST = 1000  # bytes a second: a server that sends less does not get on
_LINK = re.compile(r"<a\s[^>]*?href\s*=\s*[\"']([^\"'>]*)[\"']", re.IGNORECASE)
_PASSING = {408, 425, 429}


class HttpPlace:
    """A folder of a web server; see `cache_schema.storage.remote.Place`."""

    writable = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def stat(self, name: str) -> Stat | None:
        """Return size and entity tag, or time of the last change, of a file."""
        with self._answer("HEAD", name) as answer:
            if answer.status_code in (404, 410) or str(answer.url).endswith("/"):
                return None
            return Stat(_number(answer.headers.get("content-length"), answer.url), _tag(answer))

    def get(self, name: str, start: int, stop: int, tag: str) -> bytes:
        """Return a range of a file; raises FileNotFoundError, ChangedWhileRead."""
        with self._answer("GET", name, {"Range": f"bytes={start}-{stop - 1}"}) as answer:
            if answer.status_code in (404, 410):
                raise FileNotFoundError(name)
            if answer.status_code == 416 or _tag(answer) != tag:
                raise ChangedWhileRead
            # A server that has no ranges sends everything: that is enough where it was asked for from the beginning.
            if answer.status_code != 206 and start:
                raise CacheError(
                    f"the server of {self.url} does not send parts of files (HTTP ranges); use one that does, or copy "
                    "the cache here whole"
                )
            return _read(answer, stop - start)

    def list_folder(self, under: str) -> list[str]:
        """Return the names in the server's listing of a sub-folder."""
        return [name.rstrip("/") for name in self._listing(under)]

    def list_files(self) -> dict[str, int]:
        """Return the names of all files, folder after folder, and their sizes, each asked for."""
        files: dict[str, int] = {}
        folders = [""]
        for visited, folder in enumerate(folders):
            if visited > _MAX_FOLDERS:
                raise CacheCorrupt(f"{self.url} lists more than {_MAX_FOLDERS} folders")
            for name in self._listing(folder):
                path = f"{folder}/{name.rstrip('/')}".lstrip("/")
                if name.endswith("/"):
                    folders.append(path)
                elif (stat := self.stat(path)) is not None:
                    files[path] = stat.size
        return files

    def put(self, name: str, data: Bytes | Path, new: bool) -> bool:
        """Refuse: nothing is written here."""
        raise CacheStorageError(f"cannot write {self.url}/{name}: web servers are only read")

    def delete(self, name: str) -> None:
        """Refuse: nothing is removed here."""
        raise CacheStorageError(f"cannot remove {self.url}/{name}: web servers are only read")

    def _listing(self, under: str) -> list[str]:
        """Return the names in a folder, those of folders with `/` at the end; raises CacheCorrupt for hostile ones."""
        folder = f"{under}/" if under else ""
        with self._answer("GET", folder) as answer:
            if answer.status_code in (404, 410):
                return []
            text = _read(answer, _MAX_LISTING).decode("utf-8", "replace")
            base = str(answer.url)
        names = []
        for link in _LINK.findall(text):
            target = urljoin(base, unescape(link))
            # Links to the parent, to sort orders and to elsewhere are part of what servers write around a listing.
            if target.startswith(base) and "?" not in target and (name := unquote(target[len(base) :])):
                check_listed(name.removesuffix("/"), f"{self.url}/{folder}")
                if "/" in name.removesuffix("/"):
                    raise CacheCorrupt(f"{self.url}/{folder} lists {name[:200]!r}, which does not lie in it")
                names.append(name)
            elif "\\" in link or ".." in unquote(link).split("/")[1:]:
                raise CacheCorrupt(f"{self.url}/{folder} lists {link[:200]!r}, which does not lie in it")
        return names

    def _answer(self, method: str, name: str, headers: dict[str, str] | None = None) -> "_Answer":
        return _Answer(self.url, method, f"{self.url}/{quote(name)}", headers or {})


class _Answer:
    """The answer to a request, redirects within its host followed, as a context; what may pass raises Transient."""

    def __init__(self, place: str, method: str, url: str, headers: dict[str, str]) -> None:
        self._place, self._method, self._url = place, method, url
        # Compressed, lengths and ranges would be of something else than the file.
        self._headers = {"Accept-Encoding": "identity", **headers}
        self._response: Any = None

    def __enter__(self) -> Any:
        httpx = required("httpx", self._place)
        client, url = _client(os.getpid()), self._url
        try:
            for _ in range(_REDIRECTS):
                request = client.build_request(self._method, url, headers=self._headers)
                self._response = client.send(request, stream=True)
                if not self._response.is_redirect:
                    break
                url = _same_host(url, self._response.headers["location"])
                self._response.close()
            else:
                raise CacheUnreachable(f"{self._place} redirects in a circle")
            return self._check(self._response)
        except httpx.HTTPError as error:
            self._close()
            raise Transient(_reason(error)) from error
        except BaseException:
            self._close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._close()
        httpx = required("httpx", self._place)
        if isinstance(error, httpx.HTTPError):
            raise Transient(_reason(error)) from error

    def _check(self, response: Any) -> Any:
        status = response.status_code
        if status in _PASSING or status >= 500:
            raise Transient(f"the server answered {status}")
        if status in (401, 403):
            raise CacheUnreachable(f"{self._place} refuses access ({status}); ~/.netrc can hold the credentials")
        if status not in (200, 206, 404, 410, 416):
            raise CacheUnreachable(f"{self._place} answered {status}, which is not what a file server says")
        return response

    def _close(self) -> None:
        if self._response is not None:
            self._response.close()


@functools.lru_cache(maxsize=2)
def _client(process: int) -> Any:
    """Return the client of a process: connections do not survive a fork."""
    httpx = required("httpx", "http")
    timeout, limits = httpx.Timeout(stall(), connect=5.0), httpx.Limits(max_connections=64)
    return httpx.Client(timeout=timeout, limits=limits, auth=_credentials(httpx))


def _credentials(httpx: Any) -> Any:
    path = Path("~/.netrc").expanduser()
    try:
        return httpx.NetRCAuth(str(path)) if path.is_file() else None
    except (OSError, netrc.NetrcParseError) as error:
        raise CacheUnreachable(f"{path} cannot be read: {error}; mend it or move it away") from None


def _same_host(before: str, location: str) -> str:
    """Return where a redirect leads; raises CacheUnreachable unless that is the same host, as safe as before."""
    try:
        after = urljoin(before, location)
        old, new = urlsplit(before), urlsplit(after)
        upgraded = (old.scheme, new.scheme) == ("http", "https") and old.port in (None, 80) and new.port in (None, 443)
    except ValueError:
        raise CacheUnreachable(f"{before} redirects to what is no address") from None
    same = (old.scheme, old.hostname, old.port) == (new.scheme, new.hostname, new.port)
    if not same and not (upgraded and old.hostname == new.hostname):
        raise CacheUnreachable(
            f"{before} redirects to another host, {new.scheme}://{new.hostname}, which is not followed; "
            "give that address itself if you trust it"
        )
    return after


def _read(answer: Any, limit: int) -> bytes:
    """Return the body, or its first `limit` bytes: no more is taken in than was asked for."""
    data, started = bytearray(), time.monotonic()
    for part in answer.iter_raw():
        data += part
        if len(data) >= limit:
            break
        if time.monotonic() - started > stall() + len(data) / _SLOWEST:
            raise Transient("it took too long")
    return bytes(data[:limit])


def _number(text: str | None, url: object) -> int:
    if text is None or not text.isdigit() or len(text) > 18:
        raise CacheError(f"the server does not say how large {url} is")
    return int(text)


def _tag(answer: Any) -> str:
    return answer.headers.get("etag") or answer.headers.get("last-modified") or ""


def _reason(error: Exception) -> str:
    return {
        "ConnectError": "the connection was refused",
        "ReadTimeout": "it took too long",
        "ConnectTimeout": "it took too long",
        "RemoteProtocolError": "the connection was cut",
        "ReadError": "the connection was cut",
    }.get(type(error).__name__, type(error).__name__)

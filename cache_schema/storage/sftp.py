"""Folders of another machine over SSH, by the user's own keys, agent, known hosts and ~/.ssh/config.

Through paramiko rather than fsspec's sshfs, which takes any host for the right one unless told otherwise, and fetches
whole files where a range is asked for.
"""

import contextlib
import errno
import functools
import io
import os
import posixpath
import secrets
import stat as modes
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cache_schema.errors import CacheStorageError, CacheUnreachable
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.extras import required
from cache_schema.storage.files import is_aside
from cache_schema.storage.remote import ChangedWhileRead, Stat
from cache_schema.storage.retrying import Transient, stall

SCHEMES = ("sftp",)
_SESSIONS = 6  # at once on one connection; servers allow 10 by default
_Address = tuple[str, int | None, str | None]  # host, port, user

_REQUEST = 1 << 15  # bytes that every server sends in one answer


class SftpPlace:
    """A folder on a host; see `cache_schema.storage.remote.Place`. `sftp://host/absolute/path`, `sftp://host/~/path`."""

    writable = True

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        self._address = (parts.hostname or "", parts.port, unquote(parts.username) if parts.username else None)
        path = unquote(parts.path)
        self._root = path.removeprefix("/~/") if path.startswith("/~/") else path or "/"

    def stat(self, name: str) -> Stat | None:
        """Return size and time of the last change of a plain file."""
        with self._session(name) as sftp:
            try:
                found = sftp.stat(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _stat(found) if modes.S_ISREG(found.st_mode or 0) else None

    def get(self, name: str, start: int, stop: int, tag: str) -> bytes:
        """Return a range of a file; raises FileNotFoundError, ChangedWhileRead."""
        with self._session(name) as sftp, sftp.open(self._path(name), "rb") as file:
            if _stat(file.stat()).tag != tag:
                raise ChangedWhileRead
            pieces = [(at, min(_REQUEST, stop - at)) for at in range(start, stop, _REQUEST)]
            return b"".join(file.readv(pieces))

    def list_folder(self, under: str) -> list[str]:
        """Return the names in a sub-folder."""
        with self._session(under) as sftp:
            return [entry.filename for entry in self._entries(sftp, under)]

    def list_files(self) -> dict[str, int]:
        """Return the names and sizes of all files and links, folder after folder; links are not followed."""
        files: dict[str, int] = {}
        folders = [""]
        with self._session("") as sftp:
            for folder in folders:
                for entry in self._entries(sftp, folder):
                    name = f"{folder}/{entry.filename}".lstrip("/")
                    if modes.S_ISDIR(entry.st_mode or 0):
                        folders.append(name)
                    else:
                        files[name] = entry.st_size or 0
        return files

    def put(self, name: str, data: Bytes | Path, new: bool) -> bool:
        """Write a file aside and rename it into place, which a server does at once or not at all."""
        path = self._path(name)
        aside = f"{path}.tmp-sftp-{os.getpid()}-{secrets.token_hex(4)}-0"
        with self._session(name) as sftp:
            _make_folders(sftp, posixpath.dirname(path))
            try:
                with data.open("rb") if isinstance(data, Path) else io.BytesIO(bytes(data)) as source:
                    sftp.putfo(source, aside, confirm=True)
                if not new:
                    _tell_apart(sftp, aside, path)
                    sftp.posix_rename(aside, path)
                    return True
                return self._publish_new(sftp, aside, path)
            finally:
                with contextlib.suppress(OSError):
                    sftp.remove(aside)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._session(name) as sftp, contextlib.suppress(FileNotFoundError):
            sftp.remove(self._path(name))

    def _publish_new(self, sftp: Any, aside: str, path: str) -> bool:
        # The plain rename of the protocol replaces nothing.
        try:
            sftp.rename(aside, path)
        except OSError:
            try:
                sftp.stat(path)
            except FileNotFoundError:
                raise CacheStorageError(f"cannot write {self.url}: the server refuses to rename") from None
            return False
        return True

    def _entries(self, sftp: Any, under: str) -> list[Any]:
        try:
            return [entry for entry in sftp.listdir_attr(self._path(under)) if not is_aside(entry.filename)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name) if name else self._root

    @contextlib.contextmanager
    def _session(self, name: str) -> Iterator[Any]:
        """Give a session; what may pass raises Transient, a refusal to write CacheStorageError."""
        paramiko = required("paramiko", self.url)
        connection = _connection(self._address, os.getpid())
        try:
            with connection.session() as sftp:
                yield sftp
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise CacheStorageError(f"no permission for {self.url}/{name}") from error
        except (paramiko.SSHException, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheStorageError(f"cannot write {self.url}/{name}: no space is left there") from error
            connection.drop()
            raise Transient(f"the connection was lost ({type(error).__name__})") from error


class _Connection:
    """A connection with a host and its sessions, each used by one thread at a time; made anew after `drop`."""

    def __init__(self, address: _Address) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._limit = threading.Semaphore(_SESSIONS)
        self._client: Any = None
        self._idle: list[Any] = []

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        """Give a session that no other thread uses meanwhile."""
        with self._limit:
            with self._lock:
                if self._client is None:
                    self._client, self._idle = _connect(self._address), []
                client = self._client
                sftp = self._idle.pop() if self._idle else client.open_sftp()
            sftp.get_channel().settimeout(stall())
            try:
                yield sftp
            finally:
                with self._lock:
                    if client is self._client:
                        self._idle.append(sftp)

    def drop(self) -> None:
        """Forget a connection that was lost."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


@functools.lru_cache(maxsize=16)
def _connection(address: _Address, process: int) -> _Connection:
    """Return the connection of a process, which a process that is forked from it does not share."""
    return _Connection(address)


def _connect(address: _Address) -> Any:
    """Return a client, connected as `ssh` would connect; raises CacheUnreachable where the host or we are refused."""
    paramiko = required("paramiko", "sftp://")
    host, port, user = address
    settings = _host_settings(paramiko, host)
    client = paramiko.SSHClient()
    client.load_system_host_keys()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    jump = settings.get("proxycommand")
    try:
        client.connect(
            settings.get("hostname", host),
            port=port or int(settings.get("port", 22)),
            username=user or settings.get("user"),
            key_filename=settings.get("identityfile"),
            sock=paramiko.ProxyCommand(jump) if jump else None,
            timeout=stall(),
            banner_timeout=stall(),
            auth_timeout=stall(),
        )
    except paramiko.BadHostKeyException:
        raise CacheUnreachable(f"sftp://{host}: the host has another key than ~/.ssh/known_hosts says") from None
    except paramiko.AuthenticationException:
        raise CacheUnreachable(f"sftp://{host}: no SSH key of yours is taken; `ssh {host}` must work first") from None
    except paramiko.SSHException as error:
        if "not found in known_hosts" in str(error):
            raise CacheUnreachable(f"sftp://{host}: not in ~/.ssh/known_hosts; `ssh {host}` adds it") from None
        raise
    return client


def _host_settings(paramiko: Any, host: str) -> dict[str, Any]:
    path = Path("~/.ssh/config").expanduser()
    return paramiko.SSHConfig.from_path(str(path)).lookup(host) if path.is_file() else {}


def _make_folders(sftp: Any, path: str) -> None:
    if path in ("", "/"):
        return
    try:
        sftp.stat(path)
    except FileNotFoundError:
        _make_folders(sftp, posixpath.dirname(path))
        try:
            sftp.mkdir(path)
        except OSError:
            sftp.stat(path)  # another one made it meanwhile


def _tell_apart(sftp: Any, aside: str, path: str) -> None:
    """Give a file a later time than the one it replaces: the protocol has whole seconds alone to tell them apart."""
    with contextlib.suppress(FileNotFoundError):
        before, now = sftp.stat(path).st_mtime or 0, sftp.stat(aside).st_mtime or 0
        if now <= before:
            sftp.utime(aside, (before + 1, before + 1))


def _stat(found: Any) -> Stat:
    return Stat(found.st_size, f"{found.st_mtime}")

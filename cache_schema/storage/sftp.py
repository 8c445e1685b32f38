"""Folders of another machine over SSH, by the user's own keys, agent, known hosts and ~/.ssh/config.

Through paramiko rather than fsspec's sshfs, which takes any host for the right one unless told otherwise, and fetches
whole files where a range is asked for.
"""

import contextlib
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
from urllib.parse import SplitResult, unquote, urlsplit

from cache_schema.errors import CacheStorageError, CacheUnreachable
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.extras import required
from cache_schema.storage.files import NO_SPACE, is_aside
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
        self._address = _address(parts)
        path = unquote(parts.path)
        self._root = path[len("/~/") :] or "." if f"{path}/".startswith("/~/") else path or "/"

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
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise CacheStorageError(f"cannot write {self.url}/{name}: no space is left there") from error
            if type(error) is OSError and error.errno is None and connection.is_alive():
                # All that the protocol says of a full disk is "Failure".
                raise CacheStorageError(
                    f"{self.url}/{name}: the host answers {str(error)!r}; if it is written to, is its disk full?"
                ) from error
            connection.drop()
            raise Transient(f"the connection was lost ({type(error).__name__})") from error


class _Connection:
    """A connection with a host and its sessions, each used by one thread at a time; made anew after `drop`."""

    def __init__(self, address: _Address) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._limit = threading.Semaphore(_SESSIONS)
        self._clients: list[Any] = []  # as `_connect` returns them
        self._idle: list[Any] = []

    @contextlib.contextmanager
    def session(self) -> Iterator[Any]:
        """Give a session that no other thread uses meanwhile."""
        with self._limit:
            clients, idle = self._take()
            sftp = idle or _open_session(clients[-1])
            sftp.get_channel().settimeout(stall())
            try:
                yield sftp
            finally:
                with self._lock:
                    if clients is self._clients:
                        self._idle.append(sftp)

    def _take(self) -> tuple[list[Any], Any]:
        """Return the clients, connected, and a session that is idle, if there is one."""
        # `drop` waits for neither: a host that went silent is waited for here.
        with self._connecting:
            with self._lock:
                if self._clients:
                    return self._clients, self._idle.pop() if self._idle else None
            clients = _connect(self._address)
            with self._lock:
                self._clients, self._idle = clients, []
            return clients, None

    def is_alive(self) -> bool:
        """Say whether the host still answers, as far as is known here."""
        with self._lock:
            transport = self._clients[-1].get_transport() if self._clients else None
        return transport is not None and transport.is_active()

    def drop(self) -> None:
        """Forget a connection that was lost."""
        with self._lock:
            clients, self._clients = self._clients, []
        _close(clients)


@functools.lru_cache(maxsize=16)
def _connection(address: _Address, process: int) -> _Connection:
    """Return the connection of a process, which a process that is forked from it does not share."""
    return _Connection(address)


def _address(parts: SplitResult) -> _Address:
    host = parts.hostname or ""
    # As it was typed: ~/.ssh/config tells hosts apart by that.
    start = parts.netloc.lower().rindex(host)
    typed = parts.netloc[start : start + len(host)]
    return typed, parts.port, unquote(parts.username) if parts.username else None


def _open_session(client: Any) -> Any:
    # Not all of its steps have a time limit of their own.
    alarm = threading.Timer(stall(), client.close)
    alarm.daemon = True
    alarm.start()
    try:
        return client.open_sftp()
    finally:
        alarm.cancel()


def _close(clients: list[Any]) -> None:
    for client in reversed(clients):
        client.close()


def _connect(address: _Address, by_way_of: str | None = None) -> list[Any]:
    """Return clients, the last connected as `ssh` would connect, those before it with the hosts that lead there.

    by_way_of: these, in the words of ProxyJump; by default those of ~/.ssh/config. Raises CacheUnreachable where a host
    is refused, or we are.
    """
    paramiko = required("paramiko", "sftp://")
    host, port, user = address
    settings = _host_settings(paramiko, host)
    before, _, gate = (by_way_of or settings.get("proxyjump", "")).rpartition(",")
    # A setting for all hosts names the gate for itself as well.
    clients = _connect(_address(urlsplit(f"ssh://{gate}")), before) if gate not in ("", "none", host) else []
    client = paramiko.SSHClient()
    client.load_system_host_keys()
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    there = settings.get("hostname", host).lower(), port or int(settings.get("port", 22))
    try:
        client.connect(
            *there,
            username=user or settings.get("user"),
            key_filename=settings.get("identityfile"),
            sock=_way(paramiko, there, clients, settings.get("proxycommand")),
            timeout=stall(),
            banner_timeout=stall(),
            auth_timeout=stall(),
        )
        return [*clients, client]
    except paramiko.BadHostKeyException:
        raise CacheUnreachable(f"sftp://{host}: the host has another key than ~/.ssh/known_hosts says") from None
    except paramiko.AuthenticationException:
        raise CacheUnreachable(f"sftp://{host}: no SSH key of yours is taken; `ssh {host}` must work first") from None
    except paramiko.SSHException as error:
        if "not found in known_hosts" in str(error):
            raise CacheUnreachable(f"sftp://{host}: not in ~/.ssh/known_hosts; `ssh {host}` adds it") from None
        raise
    finally:
        if client.get_transport() is None or not client.get_transport().is_authenticated():
            _close([*clients, client])


def _way(paramiko: Any, there: tuple[str, int], clients: list[Any], command: str | None) -> Any:
    """Return what to take for a connection with a host and port; None where nothing lies between."""
    if clients:
        return clients[-1].get_transport().open_channel("direct-tcpip", there, ("127.0.0.1", 0), timeout=stall())
    return paramiko.ProxyCommand(command) if command else None


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

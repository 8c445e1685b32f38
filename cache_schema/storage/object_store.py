"""Buckets (S3 and what speaks like it, Google Cloud Storage, Azure) through obstore, with the ecosystem's credentials.

Of S3 these are what the AWS tools would use: environment, profiles in ~/.aws, single sign-on, a machine's role. They
are never part of a URL and never printed: messages are made here, not taken from the client's, which quotes requests.
"""

import functools
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cache_schema.errors import CacheCorrupt, CacheError, CacheRequestError, CacheUnreachable
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.extras import required
from cache_schema.storage.remote import ChangedWhileRead, Stat
from cache_schema.storage.retrying import Transient, stall

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az")
# No time limit for a whole request, which may move gigabytes; one for any stall.
_CLIENT = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(days=1)}
# The client's own repetitions are few and quick: how long to go on is decided in `cache_schema.storage.retrying`.
_RETRY = {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}
_PART = 16 << 20  # of an upload in parts, bytes

# The process whose threads the library runs in; they do not exist in one forked from it, where it would wait for ever.
_process: int | None = None


class ObjectStorePlace:
    """A prefix of a bucket; see `cache_schema.storage.remote.Place`."""

    writable = True

    def __init__(self, url: str) -> None:
        self.url = url

    def stat(self, name: str) -> Stat | None:
        """Return size and entity tag of an object."""
        try:
            meta = self._ask(lambda obstore, store: obstore.head(store, name))
        except FileNotFoundError:
            return None
        return Stat(meta["size"], _tag(meta))

    def get(self, name: str, start: int, stop: int, tag: str) -> Bytes:
        """Return a range of an object; raises FileNotFoundError, ChangedWhileRead."""

        def ask(obstore: Any, store: Any) -> Bytes:
            options: dict[str, Any] = {"range": (start, stop)}
            if tag.startswith('"'):
                options["if_match"] = tag
            result = obstore.get(store, name, options=options)
            if _tag(result.meta) != tag:
                raise ChangedWhileRead
            return memoryview(result.bytes())

        return self._ask(ask)

    def whole(self, name: str, limit: int) -> tuple[int, Bytes] | None:
        """Return size and contents of an object; those of a large one are not waited for."""

        def ask(obstore: Any, store: Any) -> tuple[int, Bytes]:
            result = obstore.get(store, name)
            size = result.meta["size"]
            return size, memoryview(result.bytes()) if size <= limit else b""

        try:
            return self._ask(ask)
        except FileNotFoundError:
            return None

    def list_folder(self, under: str) -> list[str]:
        """Return the names of objects, and of prefixes, one level below."""
        found = self._ask_bucket(lambda obstore, store: obstore.list_with_delimiter(store, under or None))
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return [path.removeprefix(f"{under}/").rstrip("/") for path in paths]

    def list_files(self) -> dict[str, int]:
        """Return the names and sizes of all objects, a thousand of them a request."""
        return self._ask_bucket(
            lambda obstore, store: {
                meta["path"]: meta["size"] for part in obstore.list(store, chunk_size=1000) for meta in part
            }
        )

    def put(self, name: str, data: Bytes | Path, new: bool) -> bool:
        """Write an object; large ones in parts, which become visible together."""

        def ask(obstore: Any, store: Any) -> bool:
            if new:
                obstore.put(store, name, bytes(data), mode="create")
            elif isinstance(data, Path):
                obstore.put(store, name, data, chunk_size=_PART)
            else:
                obstore.put(store, name, bytes(data), chunk_size=_PART)
            return True

        from obstore.exceptions import AlreadyExistsError

        try:
            return self._ask_bucket(ask)
        except AlreadyExistsError:
            return False

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""
        try:
            self._ask(lambda obstore, store: obstore.delete(store, name))
        except FileNotFoundError:
            return

    def _ask_bucket(self, request: Callable[[Any, Any], T]) -> T:
        """Return the answer to a request that needs nothing but the bucket to be there."""
        try:
            return self._ask(request)
        except FileNotFoundError:
            bucket = self.url.split("/")[2]
            raise CacheUnreachable(f"{self.url}: there is no bucket {bucket}; check its name, and make it") from None

    def _ask(self, request: Callable[[Any, Any], T]) -> T:
        """Return the answer to a request; FileNotFoundError, ChangedWhileRead and AlreadyExistsError pass through."""
        global _process
        obstore = required("obstore", self.url)
        from obstore import exceptions

        if _process not in (None, os.getpid()):
            raise CacheRequestError(
                f"{self.url} was opened before this process was forked, which its client does not survive; start "
                'workers afresh (a DataLoader\'s multiprocessing_context="spawn")'
            )
        _process = os.getpid()
        try:
            return request(obstore, _store(self.url, os.getpid()))
        except exceptions.PreconditionError:
            raise ChangedWhileRead from None
        except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
            raise CacheUnreachable(
                f"{self.url} refuses these credentials; check what the tools of that place use (for s3 AWS_PROFILE or "
                "AWS_ACCESS_KEY_ID, for gs GOOGLE_APPLICATION_CREDENTIALS, for az AZURE_STORAGE_ACCOUNT_NAME)"
            ) from None
        except exceptions.InvalidPathError as error:
            raise CacheCorrupt(f"{self.url} lists names that are not those of files inside it") from error
        except (exceptions.AlreadyExistsError, FileNotFoundError):
            raise
        except exceptions.NotSupportedError as error:
            raise CacheError(f"{self.url} cannot do what is needed: {_reason(error)}") from None
        except exceptions.BaseError as error:
            if _status(error) == 404:
                raise FileNotFoundError(self.url) from None
            if _is_of_another_region(error):
                raise CacheUnreachable(
                    f"{self.url} is in another region than this is asked in; set AWS_REGION to the bucket's"
                ) from None
            if _status(error) == 501:
                raise CacheError(
                    f"{self.url} does not know a request that is needed here ({_message(error)}); use a server that "
                    "does, as S3 itself"
                ) from None
            raise Transient(_reason(error)) from None


def _client_options() -> dict[str, Any]:
    return {**_CLIENT, "read_timeout": timedelta(seconds=stall())}


@functools.lru_cache(maxsize=32)
def _store(url: str, process: int) -> Any:
    """Return the client of a URL in a process."""
    obstore_store = required("obstore.store", url)
    parts = urlsplit(url)
    options: dict[str, Any] = {"client_options": _client_options(), "retry_config": dict(_RETRY)}
    try:
        if parts.scheme == "s3":
            return _s3(obstore_store, url, options)
        return obstore_store.from_url(url, **options)
    except Exception as error:  # noqa: BLE001 -- of whatever kind, it is about the URL or the set-up
        raise CacheUnreachable(f"{url} cannot be opened: {_reason(error)}") from None


def _s3(obstore_store: Any, url: str, options: dict[str, Any]) -> Any:
    session = _aws_session(url, os.getpid())
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or session.get_scoped_config().get("endpoint_url")
    )
    if endpoint:
        options["endpoint"] = endpoint
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
    options["region"] = os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    credentials = session.get_credentials()
    if credentials is None:
        # Nobody is known here: only what is public can be read.
        options["skip_signature"] = True
    else:
        options["credential_provider"] = functools.partial(_current, credentials)
    return obstore_store.S3Store.from_url(url, **options)


@functools.lru_cache(maxsize=1)
def _aws_session(url: str, process: int) -> Any:
    return required("botocore.session", url).Session()


def _current(credentials: Any) -> dict[str, Any]:
    """Return credentials as they are now: those of a role change every hour."""
    frozen = credentials.get_frozen_credentials()
    return {
        "access_key_id": frozen.access_key,
        "secret_access_key": frozen.secret_key,
        "token": frozen.token,
        "expires_at": datetime.now(UTC) + timedelta(minutes=5),
    }


def _tag(meta: Any) -> str:
    return meta["e_tag"] or meta["last_modified"].isoformat()


def _reason(error: BaseException) -> str:
    """Return the kind of failure in a few words: the client's own message quotes the whole request."""
    text, status = str(error), _status(error)
    if status is not None:
        return {429: "too many requests (429)", 503: "the server is busy (503)"}.get(
            status, f"the server failed ({status})" if status >= 500 else f"the server answered {status}"
        )
    for sign, words in (
        ("onnection refused", "the connection was refused"), ("timed out", "it took too long"), ("dns", "no such host"),
    ):  # fmt: skip
        if sign in text:
            return words
    return "the connection was lost" if "error sending request" in text or "body" in text else type(error).__name__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that the client was answered, if it was."""
    found = re.search(r"status code: ([1-5][0-9]{2})\b", str(error))
    return None if found is None else int(found[1])


def _is_of_another_region(error: BaseException) -> bool:
    signs = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint", "without LOCATION")
    return any(sign in str(error) for sign in signs)


def _message(error: BaseException) -> str:
    """Return what the server says of a refusal, as far as it can be shown."""
    found = re.search(r"<Message>([ -;=-~]{1,200}?)</Message>", str(error))
    return "501" if found is None else found[1].rstrip(".")

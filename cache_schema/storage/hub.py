"""Data sets of the Hugging Face Hub through its own client: read by ranges, written in few commits.

Credentials are the Hub's own: `hf auth login`, or HF_TOKEN. Another end point than huggingface.co: HF_ENDPOINT.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from cache_schema.errors import CacheRequestError, CacheStorageError, CacheUnreachable, printable
from cache_schema.storage import hub_rules
from cache_schema.storage.checksum import Bytes
from cache_schema.storage.extras import required
from cache_schema.storage.remote import ChangedWhileRead, Stat
from cache_schema.storage.retrying import Transient, stall

T = TypeVar("T")

SCHEMES = ("hf",)
_URL = re.compile(r"hf://datasets/(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<root>.+))?")
_SLOW = 120.0  # seconds: a commit of many files is answered once it is done
_FOR_GIT = (".gitattributes", ".gitignore")


class HubPlace:
    """A folder of a data set's repository; see `cache_schema.storage.remote.CommittingPlace`."""

    writable = True
    files_per_commit = hub_rules.FILES_A_COMMIT

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        found = _URL.fullmatch(self.url)
        if found is None:
            raise CacheRequestError(f"{url}: write hf://datasets/OWNER/NAME, and a folder of it if there is one")
        self._repository = f"{found['owner']}/{found['name']}"
        self._revision = unquote(found["revision"]) if found["revision"] else "main"
        self._root = unquote(found["root"] or "")
        self._is_there = False

    def stat(self, name: str) -> Stat | None:
        """Return size and entity tag of a file."""

        def ask(hub: Any) -> Stat | None:
            found = hub.get_hf_file_metadata(
                self._url(hub, name), token=_token(hub), timeout=stall(), endpoint=_endpoint(hub)
            )
            return None if found.size is None else Stat(found.size, found.etag or "")

        try:
            return self._ask(ask)
        except FileNotFoundError:
            return None

    def get(self, name: str, start: int, stop: int, tag: str) -> bytes:
        """Return a range of a file; raises FileNotFoundError, ChangedWhileRead."""

        def ask(hub: Any) -> bytes:
            from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

            headers = build_hf_headers(token=_token(hub))
            headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            response = hub.get_session().get(self._url(hub, name), headers=headers, timeout=stall())
            if response.status_code == 416:
                return b""
            hf_raise_for_status(response)
            if _tag_of([*response.history, response], urlsplit(_endpoint(hub)).hostname) != tag:
                raise ChangedWhileRead
            return response.content if response.status_code == 206 else response.content[start:stop]

        return self._ask(ask)

    def list_folder(self, under: str) -> list[str]:
        """Return the names in a sub-folder."""
        path = "/".join(part for part in (self._root, under) if part)
        return [_relative(entry.path, path) for entry in self._tree(path, recursive=False) if not _is_for_git(entry)]

    def list_files(self) -> dict[str, int]:
        """Return the names and sizes of all files."""
        found = (entry for entry in self._tree(self._root, recursive=True) if hasattr(entry, "size"))
        return {_relative(entry.path, self._root): entry.size for entry in found if not _is_for_git(entry)}

    def put(self, name: str, data: Bytes | Path, new: bool) -> bool:
        """Write one file in a commit of its own."""
        return self.commit({name: data}, unless=name if new else None)

    def delete(self, name: str) -> None:
        """Remove one file in a commit of its own."""
        self.commit({}, remove=[name])

    def commit(self, files: Mapping[str, Bytes | Path], remove: Sequence[str] = (), unless: str | None = None) -> bool:
        """Write and remove files in one commit, none of it where there is a file `unless`; say whether it was done.

        A repository that is not there is made, a private one.
        """
        if len(files) + len(remove) > self.files_per_commit:
            raise CacheStorageError(f"{self.url}: a commit takes at most {self.files_per_commit} files")
        self._ask(self._make_repository)

        def ask(hub: Any) -> bool:
            api, parent = _api(hub), None
            if unless is not None:
                # The commit is refused if there is another one after this.
                parent = api.repo_info(self._repository, repo_type="dataset", revision=self._revision).sha
                if self._present(hub, [unless], parent):
                    return False
            operations = [
                hub.CommitOperationAdd(self._path(name), str(data) if isinstance(data, Path) else bytes(data))
                for name, data in files.items()
            ]
            operations += [hub.CommitOperationDelete(path) for path in self._present(hub, remove, self._revision)]
            if operations:
                api.create_commit(
                    self._repository, operations, commit_message=f"{len(operations)} files by dit-cache",
                    repo_type="dataset", revision=self._revision, parent_commit=parent,
                )  # fmt: skip
            return True

        with _quiet():
            return self._ask(ask)

    def check_layout(self, files: Mapping[str, int]) -> None:
        """Raise CacheRequestError where files of these sizes may not be added to what is there."""
        others = [entry.path for entry in self._tree("", recursive=True) if hasattr(entry, "size")]
        hub_rules.check_layout(self.url, {self._path(name): size for name, size in files.items()}, others)

    def is_public(self) -> bool:
        """Say whether everybody can read what is here; a repository that is not there yet will be private."""

        def ask(hub: Any) -> bool:
            return not _api(hub).repo_info(self._repository, repo_type="dataset").private

        try:
            return self._ask(ask)
        except FileNotFoundError:
            return False

    def _make_repository(self, hub: Any) -> None:
        if self._is_there:
            return
        try:
            _api(hub).repo_info(self._repository, repo_type="dataset")
        except hub.errors.RepositoryNotFoundError:
            _api(hub).create_repo(self._repository, repo_type="dataset", private=True, exist_ok=True)
        self._is_there = True

    def _present(self, hub: Any, names: Sequence[str], revision: str) -> list[str]:
        """Return the paths in the repository of those files that are there."""
        paths = [self._path(name) for name in names]
        found = _api(hub).get_paths_info(self._repository, paths, repo_type="dataset", revision=revision)
        return [entry.path for entry in found] if paths else []

    def _tree(self, path: str, recursive: bool) -> list[Any]:
        def ask(hub: Any) -> list[Any]:
            tree = _api(hub).list_repo_tree(
                self._repository, path or None, recursive=recursive, revision=self._revision, repo_type="dataset"
            )
            return list(tree)

        try:
            return self._ask(ask)
        except FileNotFoundError:
            return []

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name

    def _url(self, hub: Any, name: str) -> str:
        return hub.hf_hub_url(
            self._repository, self._path(name), repo_type="dataset", revision=self._revision, endpoint=_endpoint(hub)
        )

    def _ask(self, request: Callable[[Any], T]) -> T:
        """Return the answer to a request; FileNotFoundError where the file, or the repository, is not there."""
        hub = required("huggingface_hub", self.url)
        # Only what was imported once is an attribute of it.
        required("huggingface_hub.errors", self.url)
        required("huggingface_hub.constants", self.url)
        _bound_waiting(hub)
        try:
            return request(hub)
        except (ChangedWhileRead, CacheRequestError):
            raise
        except Exception as error:
            # What fails in a thread of an upload comes wrapped.
            raise self._explained(
                hub, error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
            ) from error

    def _explained(self, hub: Any, error: BaseException) -> BaseException:
        """Return what an error of the client's means here: Transient where it may pass."""
        errors = hub.errors
        if isinstance(error, errors.EntryNotFoundError):
            return FileNotFoundError(str(self.url))
        if isinstance(error, errors.GatedRepoError):
            return CacheUnreachable(f"{self.url} asks for its terms to be accepted, on its page, by whoever reads it")
        if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            if _token(hub) is None:
                return CacheUnreachable(f"{self.url} is not there, or not public: `hf auth login` stores credentials")
            return FileNotFoundError(str(self.url))
        if isinstance(error, errors.HfHubHTTPError):
            return self._of_status(error)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return CacheUnreachable(f"{self.url} is not asked: HF_HUB_OFFLINE is set")
        if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "hf_xet") or isinstance(
            error, ConnectionError | TimeoutError
        ):
            return Transient(_of_connection(error))
        if isinstance(error, ValueError | RuntimeError):
            return CacheStorageError(f"{self.url}: the Hub's client refuses: {_first_line(error)}")
        return error

    def _of_status(self, error: Any) -> BaseException:
        status = error.response.status_code
        if status in (401, 403):
            return CacheUnreachable(f"{self.url} refuses access; `hf auth login` stores credentials that may write")
        if status in (409, 412):
            return Transient(f"others write there at the same time ({status})")
        if status == 429:
            return Transient("too many requests (429)", wait=_asked_to_wait(error.response.headers))
        if status >= 500 or status == 408:
            return Transient(f"the server failed ({status})")
        said = error.server_message or _first_line(error)
        return CacheStorageError(f"{self.url}: the Hub refuses ({status}): {printable(said)[:200]}")


def _endpoint(hub: Any) -> str:
    return (os.environ.get("HF_ENDPOINT") or hub.constants.ENDPOINT).rstrip("/")


def _api(hub: Any) -> Any:
    return hub.HfApi(endpoint=_endpoint(hub))


def _token(hub: Any) -> str | None:
    return hub.get_token()


def _bound_waiting(hub: Any) -> None:
    """Have no request wait for ever: the client's own requests have no time limit."""
    session = hub.get_session()
    if session.timeout.read is None:
        session.timeout = _SLOW


def _tag_of(responses: Sequence[Any], host: str | None) -> str:
    """Return the entity tag of a file from the last answer of the Hub itself: what it leads to has tags of its own."""
    headers = [response.headers for response in responses if response.url.host == host][-1]
    return (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    """Return for how many seconds a server that is asked too much wants to be left alone, 0 where it does not say."""
    limit = re.search(r"\bt=(\d{1,6})", headers.get("ratelimit", ""))
    after = headers.get("retry-after", "")
    return float(limit[1]) if limit else float(after) if after.isdecimal() and len(after) < 7 else 0.0


def _of_connection(error: BaseException) -> str:
    text = f"{type(error).__name__} {error}"
    if "Timeout" in text:
        return "it took too long"
    return "the connection was refused" if "efused" in text else "the connection was lost"


def _first_line(error: BaseException) -> str:
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def _relative(path: str, root: str) -> str:
    return path.removeprefix(f"{root}/") if root else path


def _is_for_git(entry: Any) -> bool:
    return entry.path in _FOR_GIT


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave progress bars and lines about repeated requests to us."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, shown = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            enable_progress_bars()

"""A server on loopback that speaks the part of the Hugging Face Hub's HTTP API that its own client uses here.

It holds to the Hub's rules: what breaks one is refused. Large files go the way of Git LFS; the Hub's own transfer (xet)
is not spoken.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 512  # bytes from which a file goes through LFS


class Repository:
    """A data set's repository: its commits, each {path: contents or the SHA-256 of a large file}."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, bytes | str]]] = [("0" * 40, {".gitattributes": b"*.bin lfs\n"})]

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def files(self, revision: str) -> dict[str, bytes | str] | None:
        if revision == "main":
            return self.commits[-1][1]
        return next((files for name, files in self.commits if name == revision), None)


class HubServer:
    """Repositories by id; `uploaded` are the large files that came, in order, by SHA-256."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.uploaded: list[str] = []
        self.operations: list[int] = []  # of each commit
        self.lies = False  # stores other bytes than it is sent, and says that all is well
        self.busy = 0  # commits that are answered by 429, with a time to wait
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def contents(self, stored: bytes | str) -> bytes:
        """The bytes of a file, wherever they are kept."""
        return self.large[stored] if isinstance(stored, str) else stored


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _broken_rule(files: dict[str, bytes | str], operations: int) -> str:
    folders: dict[str, set[str]] = {}
    for path in files:
        parts = path.split("/")
        for i in range(len(parts)):
            folders.setdefault("/".join(parts[:i]), set()).add(parts[i])
    if operations >= 100:
        return "a commit of too many files"
    if len(files) >= 100_000 or max(map(len, folders.values()), default=0) >= 10_000:
        return "too many files"
    return ""


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status: int, document: object = None, data: bytes = b"", **headers: str) -> None:
            body = data if document is None else json.dumps(document).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, what: str) -> None:
            self.reply(404, {"error": f"{what} not found"}, X_Error_Code=what)

        def here(self, path: str) -> str:
            return f"http://{self.headers['Host']}{path}"

        def answer(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = urlsplit(self.path)
            path, self.query = parts.path, parse_qs(parts.query)
            for method, pattern, serve in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method:
                    arguments = [unquote(part or "") for part in found.groups()]
                    with hub.lock:
                        serve(self, *arguments)
                    return
            self.reply(404, {"error": f"{self.command} {path} is not served"})

        do_GET = do_HEAD = do_PUT = do_POST = answer  # noqa: N815

        def repository(self, name: str) -> Repository | None:
            found = hub.repositories.get(name)
            if found is None or (found.private and "Authorization" not in self.headers):
                self.missing("RepoNotFound")
                return None
            return found

        def create(self) -> None:
            asked = json.loads(self.body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in hub.repositories:
                self.reply(409, {"error": "exists", "url": self.here(f"/datasets/{name}")})
                return
            hub.repositories[name] = Repository(
                "private" in (asked.get("visibility"), asked.get("private") and "private")
            )
            self.reply(200, {"url": self.here(f"/datasets/{name}")})

        def info(self, name: str, revision: str) -> None:
            if (repository := self.repository(name)) is not None:
                self.reply(200, {"id": name, "sha": repository.head, "private": repository.private, "siblings": []})

        def preupload(self, name: str, revision: str) -> None:
            repository = self.repository(name)
            if repository is None:
                return
            answer = []
            for file in json.loads(self.body)["files"]:
                there = repository.files("main").get(file["path"])
                oid = None if there is None else there if isinstance(there, str) else _oid(there)
                mode = "lfs" if file["size"] >= LARGE else "regular"
                answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.reply(200, {"files": answer})

        def batch(self, name: str) -> None:
            objects = []
            for asked in json.loads(self.body)["objects"]:
                known = {"oid": asked["oid"], "size": asked["size"]}
                if asked["oid"] not in hub.large:
                    known["actions"] = {"upload": {"href": self.here(f"/lfs/{asked['oid']}")}}
                objects.append(known)
            self.reply(200, {"transfer": "basic", "objects": objects})

        def upload(self, oid: str) -> None:
            if hashlib.sha256(self.body).hexdigest() != oid:
                self.reply(400, {"error": "wrong hash"})
                return
            hub.large[oid] = bytes([self.body[0] ^ 1]) + self.body[1:] if hub.lies else self.body
            hub.uploaded.append(oid)
            self.reply(200)

        def commit(self, name: str, revision: str) -> None:
            repository = self.repository(name)
            if repository is None:
                return
            if hub.busy:
                hub.busy -= 1
                self.reply(429, {"error": "slow down"}, RateLimit='"api";r=0;t=1')
                return
            lines = [json.loads(line) for line in self.body.splitlines()]
            header, operations = lines[0]["value"], lines[1:]
            if header.get("parentCommit") not in (None, repository.head):
                self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
                return
            files = dict(repository.files("main"))
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    assert len(hub.large[value["oid"]]) == value["size"]
                    files[value["path"]] = value["oid"]
                else:
                    del files[value["path"]]
            if broken := _broken_rule(files, len(operations)):
                self.reply(400, {"error": broken})
                return
            hub.operations.append(len(operations))
            repository.commits.append((f"{len(repository.commits):040x}", files))
            self.reply(200, {"commitUrl": self.here(f"/{name}/commit/{repository.head}"), "commitOid": repository.head})

        def entry(self, path: str, stored: bytes | str) -> dict:
            data = hub.contents(stored)
            known = {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
            if isinstance(stored, str):
                known["lfs"] = {"oid": stored, "size": len(data), "pointerSize": 134}
            return known

        def tree(self, name: str, revision: str, under: str) -> None:
            repository = self.repository(name)
            if repository is None:
                return
            files = repository.files(revision) or {}
            inside = {path: stored for path, stored in files.items() if not under or path.startswith(f"{under}/")}
            if not inside:
                self.missing("EntryNotFound")
                return
            entries, folders = [], set()
            recursive = self.query.get("recursive", [""])[0].lower() == "true"
            for path, stored in sorted(inside.items()):
                first, _, rest = path[len(under) + 1 if under else 0 :].partition("/")
                if rest:
                    folders.add(f"{under}/{first}" if under else first)
                if recursive or not rest:
                    entries.append(self.entry(path, stored))
            entries += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)]
            # In pages, as the Hub does.
            start = int(self.query.get("cursor", ["0"])[0])
            headers = {}
            if start + 20 < len(entries):
                query = f"recursive={recursive}&cursor={start + 20}"
                headers["Link"] = f'<{self.here(urlsplit(self.path).path)}?{query}>; rel="next"'
            self.reply(200, entries[start : start + 20], **headers)

        def paths(self, name: str, revision: str) -> None:
            repository = self.repository(name)
            if repository is None:
                return
            files = repository.files(revision) or {}
            wanted = parse_qs(self.body.decode()).get("paths") or []
            if self.headers.get("Content-Type", "").startswith("application/json"):
                wanted = json.loads(self.body)["paths"]
            self.reply(200, [self.entry(path, files[path]) for path in wanted if path in files])

        def resolve(self, name: str, revision: str, path: str) -> None:
            repository = self.repository(name)
            if repository is None:
                return
            stored = (repository.files(revision) or {}).get(path)
            if stored is None:
                self.missing("EntryNotFound")
                return
            if isinstance(stored, str):
                size = str(len(hub.large[stored]))
                # Another host, as far as a client can see.
                elsewhere = self.here(f"/cdn/{stored}").replace("127.0.0.1", "localhost")
                self.reply(302, Location=elsewhere, X_Linked_Etag=f'"{stored}"', X_Linked_Size=size)
                return
            self.range(stored, ETag=f'"{_oid(stored)}"', X_Repo_Commit=repository.head)

        def cdn(self, oid: str) -> None:
            self.range(hub.large[oid], ETag='"of the store"')

        def range(self, data: bytes, **headers: str) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if asked is None or self.command == "HEAD":
                self.reply(200, data=data, Content_Length=str(len(data)), **headers)
            elif int(asked[1]) >= len(data):
                self.reply(416)
            else:
                self.reply(206, data=data[int(asked[1]) : int(asked[2]) + 1], **headers)

        def yaml(self) -> None:
            self.reply(200, {"errors": [], "warnings": []})

        def log_message(self, *_: object) -> None:
            pass

    repository = r"([\w.-]+/[\w.-]+)"
    _ROUTES = (
        (("POST",), "/api/repos/create", Handler.create),
        (("GET",), f"/api/datasets/{repository}(?:/revision/([^/]+))?", Handler.info),
        (("POST",), f"/api/datasets/{repository}/preupload/([^/]+)", Handler.preupload),
        (("POST",), f"/datasets/{repository}.git/info/lfs/objects/batch", Handler.batch),
        (("PUT",), "/lfs/([0-9a-f]{64})", Handler.upload),
        (("POST",), f"/api/datasets/{repository}/commit/([^/]+)", Handler.commit),
        (("GET",), f"/api/datasets/{repository}/tree/([^/]+)(?:/(.+))?", Handler.tree),
        (("POST",), f"/api/datasets/{repository}/paths-info/([^/]+)", Handler.paths),
        (("GET", "HEAD"), f"/datasets/{repository}/resolve/([^/]+)/(.+)", Handler.resolve),
        (("GET", "HEAD"), "/cdn/([0-9a-f]{64})", Handler.cdn),
        (("POST",), "/api/validate-yaml", Handler.yaml),
    )
    return Handler

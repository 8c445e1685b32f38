"""A thin S3 server for measurements: one process that serves a folder, at one port a delay that requests are met with.

`python -m benchmarks.object_server FOLDER DELAY …` prints the port of every delay (milliseconds) and serves until it is
killed. It knows what object clients ask for (ranges, listings, uploads in parts) and nothing about credentials. The
S3 servers that tests use hold objects in memory and cut every range out of a copy of the whole; this one hands files
to the socket by `sendfile`, so that what is measured is the clients.
"""

import os
import re
import socketserver
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from email.utils import formatdate
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

_PIECE = 1 << 20
_PAGE = 1000  # objects of one listing


class _Connection(socketserver.StreamRequestHandler):
    """The requests of one connection, one after the other."""

    disable_nagle_algorithm = True
    rbufsize = 1 << 16

    def __init__(self, root: Path, delay: float, *args: object) -> None:
        self._root, self._delay = root, delay
        super().__init__(*args)  # type: ignore[arg-type]

    def handle(self) -> None:
        while line := self.rfile.readline():
            method, target, _ = line.decode().split(" ", 2)
            headers: dict[str, str] = {}
            while (field := self.rfile.readline().decode().strip()) != "":
                name, _, value = field.partition(":")
                headers[name.lower()] = value.strip()
            if headers.get("expect") == "100-continue":
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if self._delay:
                time.sleep(self._delay)
            parts = urlsplit(target)
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
            try:
                getattr(self, f"_{method.lower()}")(bucket, key, query, headers)
            except FileNotFoundError:
                self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", method == "HEAD")

    def _get(self, bucket: str, key: str, query: dict[str, str], headers: Mapping[str, str]) -> None:
        if not key:
            return self._list(bucket, query)
        with (self._root / bucket / key).open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            start, stop, code, extra = 0, status.st_size, 200, {}
            if asked := headers.get("range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or stop) + 1, stop)
                code, extra = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{status.st_size}"}
            self._head_of(code, stop - start, {**_described(status), **extra})
            while start < stop:
                sent = os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start)
                if not sent:
                    raise ConnectionError
                start += sent
        return None

    def _head(self, bucket: str, key: str, query: dict[str, str], headers: Mapping[str, str]) -> None:
        status = (self._root / bucket / key).stat()
        if not key or not (self._root / bucket / key).is_file():
            raise FileNotFoundError
        self._head_of(200, status.st_size, _described(status))

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token", query.get("start-after", ""))
        objects: list[str] = []
        folders: set[str] = set()
        last = None
        for name, size in _files(self._root / bucket, prefix):
            if name <= after:
                continue
            if delimiter and (at := name.find(delimiter, len(prefix))) >= 0:
                folders.add(name[: at + 1])
                continue
            if len(objects) == _PAGE:
                last = name
                break
            status = (self._root / bucket / name).stat()
            modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(status.st_mtime))
            objects.append(
                f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size><ETag>{_tag(status)}</ETag>"
                f"<LastModified>{modified}</LastModified></Contents>"
            )
            after = name
        more = f"<NextContinuationToken>{escape(after)}</NextContinuationToken>" if last else ""
        prefixes = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders)
        text = f"<IsTruncated>{str(bool(last)).lower()}</IsTruncated>{more}{''.join(objects)}{prefixes}"
        self._answer(200, f"<ListBucketResult>{text}</ListBucketResult>".encode())

    def _put(self, bucket: str, key: str, query: dict[str, str], headers: Mapping[str, str]) -> None:
        path = self._root / bucket / key
        if "uploadId" in query:
            path = self._part(query["uploadId"], int(query["partNumber"]))
        elif headers.get("if-none-match") == "*" and path.exists():
            self.rfile.read(int(headers["content-length"]))
            return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._part("aside", threading.get_ident())
        aside.parent.mkdir(exist_ok=True)
        with aside.open("wb", buffering=0) as file:
            left, piece = int(headers["content-length"]), bytearray(_PIECE)
            while left:
                got = self.rfile.readinto1(memoryview(piece)[: min(left, _PIECE)])
                if not got:
                    raise ConnectionError
                file.write(memoryview(piece)[:got])
                left -= got
            status = os.fstat(file.fileno())
        aside.replace(path)
        return self._answer(200, b"", tag=_tag(status))

    def _post(self, bucket: str, key: str, query: dict[str, str], headers: Mapping[str, str]) -> None:
        body = self.rfile.read(int(headers.get("content-length", 0))).decode()
        if "delete" in query:
            keys = re.findall("<Key>(.*?)</Key>", body)
            for each in keys:
                (self._root / bucket / unescape(each)).unlink(missing_ok=True)
            deleted = "".join(f"<Deleted><Key>{each}</Key></Deleted>" for each in keys)
            return self._answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())
        if "uploads" in query:
            upload = uuid.uuid4().hex
            text = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            return self._answer(200, text.encode())
        parts = sorted(self._part(query["uploadId"], 0).parent.iterdir(), key=lambda path: int(path.name))
        path = self._root / bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with parts[0].open("r+b", buffering=0) as whole:
            whole.seek(0, os.SEEK_END)
            for part in parts[1:]:
                with part.open("rb", buffering=0) as file:
                    os.sendfile(whole.fileno(), file.fileno(), 0, part.stat().st_size)
                part.unlink()
            status = os.fstat(whole.fileno())
        parts[0].replace(path)
        return self._answer(200, f"<R><ETag>{_tag(status)}</ETag></R>".encode())

    def _part(self, upload: str, number: int) -> Path:
        return self._root / f".{upload}" / str(number)

    def _answer(self, code: int, body: bytes, head: bool = False, tag: str | None = None) -> None:
        self._head_of(code, len(body), {"Content-Type": "application/xml", **({"ETag": tag} if tag else {})})
        if not head:
            self.wfile.write(body)

    def _head_of(self, code: int, length: int, headers: Mapping[str, str]) -> None:
        lines = [
            f"HTTP/1.1 {code} .",
            f"Content-Length: {length}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode())


def _described(status: os.stat_result) -> dict[str, str]:
    modified = formatdate(status.st_mtime, usegmt=True)
    return {"ETag": _tag(status), "Last-Modified": modified, "Accept-Ranges": "bytes"}


def _tag(status: os.stat_result) -> str:
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'


def _files(bucket: Path, prefix: str) -> list[tuple[str, int]]:
    """Return names and sizes of the objects that begin with `prefix`, in the order of a listing."""
    under = bucket / prefix.rpartition("/")[0]
    found = ((path.relative_to(bucket).as_posix(), path) for path in under.rglob("*") if path.is_file())
    return sorted((name, path.stat().st_size) for name, path in found if name.startswith(prefix))


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away."""


def serve(argv: list[str]) -> None:
    root = Path(argv[0])
    servers = [_Server(("127.0.0.1", 0), partial(_Connection, root, float(delay) / 1000)) for delay in argv[1:]]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(*(server.server_address[1] for server in servers), flush=True)
    # The one who started this closes its end of the pipe when it ends, however it ends.
    sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1:])

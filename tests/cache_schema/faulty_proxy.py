"""A web proxy of the tests' own that passes requests on to a server, and fails those it is told to."""

import http.client
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit


class FaultyProxy:
    """Passes everything on until `fail` names a fault, the part of a path that it strikes, and how many times."""

    def __init__(self, target: str, latency: float = 0.0) -> None:
        self.failed = self.requests = 0
        self.latency = latency
        self._fault, self._part, self._times = "none", "", 0
        self._lock = threading.Lock()
        self.log: list[tuple[str, str]] = []
        self.stopped, self._going = threading.Event(), threading.Event()
        self._stop_method, self._stop_part, self._held, self._arrived = "", "", "", False
        self._going.set()
        self._target = urlsplit(target).netloc
        self._listen(0)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _listen(self, port: int) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self, self._target))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def go_away(self) -> None:
        """Refuse connections and cut those there are, as a server that died."""
        self._server.shutdown()
        self._server.server_close()
        self.fail("cut", "", 1 << 30)

    def come_back(self) -> None:
        """Listen where it listened, and pass everything on again."""
        self.fail("none", "", 0)
        self._listen(self._server.server_port)
        self._thread.start()

    def fail(self, fault: str, part: str, times: int) -> None:
        """Fail the next so many requests whose path has `part` in it: cut, 500, 429, truncated, wrong bytes, slow."""
        with self._lock:
            self._fault, self._part, self._times = fault, part, times

    def stop_once_answered(self, method: str, part: str, held: str = "") -> None:
        """Hold every request of a method, or of another, `held`, until `go_on`, once one of `part` has been answered.

        `part` is of the path.
        """
        self._stop_method, self._stop_part, self._held, self._arrived = method, part, held or method, False
        self._going.clear()

    def answered(self, method: str, path: str) -> None:
        """Note that the target has done what a request asked."""
        with self._lock:
            self._arrived = self._arrived or (method == self._stop_method and self._stop_part in path)

    def go_on(self) -> None:
        """Let through what is held."""
        self._going.set()

    def hold(self, method: str, path: str) -> None:
        """Note a request, and hold it if it is beyond those that are let through."""
        with self._lock:
            self.log.append((method, path))
            held = not self._going.is_set() and method == self._held and self._arrived
        if held:
            self.stopped.set()
            self._going.wait()

    def fault_of(self, path: str) -> str:
        """The fault that strikes a request now."""
        with self._lock:
            self.requests += 1
            if self._times and self._part in path:
                self._times -= 1
                self.failed += 1
                return self._fault
        return "none"

    def __enter__(self) -> "FaultyProxy":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: FaultyProxy, target: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if proxy.latency:
                time.sleep(proxy.latency)
            proxy.hold(self.command, self.path)
            fault = proxy.fault_of(self.path)
            if fault == "cut":
                # A reset, not an orderly end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
                return
            if fault in ("500", "429"):
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            connection = http.client.HTTPConnection(target)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            proxy.answered(self.command, self.path)
            self.answer(answer, answer.read(), fault)
            connection.close()

        def answer(self, answer: http.client.HTTPResponse, data: bytes, fault: str) -> None:
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if fault == "wrong bytes" and data:
                data = bytes([data[0] ^ 1]) + data[1:-1] + bytes([data[-1] ^ 1])
            if fault == "truncated":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            if fault == "slow":
                for i in range(0, len(data), max(1, len(data) // 4)):
                    self.wfile.write(data[i : i + max(1, len(data) // 4)])
                    self.wfile.flush()
                    time.sleep(0.05)
                return
            self.wfile.write(data)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    return Handler

"""A page on one's own machine: drop an image, see its neighbours in every index, by the student of each.

Nothing of a request names a file: images are asked for by their row in an index, and what is uploaded stays in memory.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.data.files import UnreadableImageError, decode_image
from trainer.errors import TrainError
from trainer.retrieval.config import ServeConfig
from trainer.retrieval.gallery import thumbnail
from trainer.retrieval.images import Images
from trainer.retrieval.index import Index
from trainer.retrieval.model import Model
from trainer.retrieval.search import Found, result_values, search_item, search_picture

_PAGE = Path(__file__).with_name("page")
_SIDE = 320  # pixels of a thumbnail
_KEPT = 2048  # thumbnails in memory
_AT_ONCE = 64  # requests
_GRACE = 3  # seconds that requests in progress are given at the end
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"),
          "/page.js": ("page.js", "text/javascript")}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """An index with the student that made it and the images that it is of."""

    index: Index
    model: Model
    images: Images


def make_app(served: Sequence[Served], config: ServeConfig) -> Starlette:
    """The page and what it asks: `POST /search` with the bytes of an image, `/neighbours/I/ROW`, `/images/I/ROW`."""
    service = _Service(served, config)
    routes = [
        *(Route(path, _file(*about)) for path, about in _FILES.items()),
        Route("/health", service.health),
        Route("/search", service.search, methods=["POST"]),
        Route("/neighbours/{index:int}/{row:int}", service.neighbours),
        Route("/images/{index:int}/{row:int}", service.image),
    ]
    middleware = [Middleware(_SafeHeaders)]
    if is_loopback(config.host):
        # Else a page elsewhere could have its own name point here, and read what is answered.
        names = ["localhost", "127.0.0.1", "[::1]", config.host]
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False))
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: _as_json, TrainError: _hidden}
    )


def listen(config: ServeConfig) -> socket.socket:
    """A socket to serve on; raises TrainError where the port is taken or the address is not of this machine."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=_AT_ONCE)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise TrainError(
            f"cannot listen on port {config.port} of {config.host}: {reason}; give another --port, or 0 for a free one"
        ) from None


def address_of(listening: socket.socket) -> str:
    """The URL at which a socket is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def make_server(app: Starlette) -> uvicorn.Server:
    """What serves an app: `run(sockets=[…])` until the process is interrupted, as KeyboardInterrupt then says.

    Requests in progress are finished first.
    """
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, limit_concurrency=_AT_ONCE,
        timeout_keep_alive=5, timeout_graceful_shutdown=_GRACE, lifespan="off", ws="none",
    )  # fmt: skip
    return uvicorn.Server(settings)


class _Service:
    """What is answered; one image is embedded at a time, as the processor is one."""

    def __init__(self, served: Sequence[Served], config: ServeConfig):
        self.served, self.config = served, config
        self._embedding = threading.Lock()
        self._thumbnail = lru_cache(_KEPT)(self._make_thumbnail)

    async def health(self, request: Request) -> Response:
        indexes = [{"student": each.index.label, "images": len(each.index)} for each in self.served]
        return JSONResponse({"status": "ok", "indexes": indexes})

    async def search(self, request: Request) -> Response:
        data = await self._body(request)
        found = await run_in_threadpool(self._search, data)
        return JSONResponse({"query": "", "class": "", "results": [_values(each) for each in found]})

    async def neighbours(self, request: Request) -> Response:
        served, row = self._asked_for(request)
        name = served.index.names[row]
        found = await run_in_threadpool(self._neighbours, served, name)
        about = {"query": name, "class": served.index.classes[row]}
        return JSONResponse({**about, "results": [_values(each) for each in found]})

    async def image(self, request: Request) -> Response:
        served, row = self._asked_for(request)
        try:
            data = await run_in_threadpool(self._thumbnail, self.served.index(served), row)
        except TrainError:  # whose message names a place on this machine
            raise HTTPException(404, "this image is not where it was indexed, or is damaged") from None
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    def _asked_for(self, request: Request) -> tuple[Served, int]:
        number, row = request.path_params["index"], request.path_params["row"]
        if number >= len(self.served) or row >= len(self.served[number].index):
            raise HTTPException(404, "there is no such image")
        return self.served[number], row

    async def _body(self, request: Request) -> bytes:
        """What is uploaded, refused as soon as it is known to be too much or takes too long."""
        limit = int(self.config.max_upload_mb * 1e6)
        too_large = HTTPException(413, f"the file is larger than {self.config.max_upload_mb:g} MB")
        stated = request.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated[:20]) > limit:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(self.config.upload_seconds):
                async for piece in request.stream():
                    data += piece
                    if len(data) > limit:
                        raise too_large
        except TimeoutError:
            raise HTTPException(408, "the file took too long to arrive") from None
        except asyncio.CancelledError:  # the server ends, and this upload has had its time
            raise HTTPException(503, "the server is stopping") from None
        except ClientDisconnect:
            raise HTTPException(400, "the file did not arrive as a whole") from None
        return bytes(data)

    def _search(self, data: bytes) -> list[Found]:
        with self._embedding:
            try:
                picture = decode_image(data, self.config.max_megapixels)
            except UnreadableImageError as error:
                raise HTTPException(422, str(error)) from None
            return [search_picture(picture, each.index, each.model, self.config.top) for each in self.served]

    def _neighbours(self, asked: Served, name: str) -> list[Found]:
        """By every index that holds the image; one of other images is searched with its pixels."""
        found = []
        for each in self.served:
            if each is asked or (_same_images(each, asked) and name in each.index.names):
                found.append(search_item(name, each.index, self.config.top))
            else:
                with self._embedding:
                    picture = asked.images.picture(name)
                    found.append(search_picture(picture, each.index, each.model, self.config.top))
        return found

    def _make_thumbnail(self, number: int, row: int) -> bytes:
        served = self.served[number]
        return thumbnail(served.images.picture(served.index.names[row]), _SIDE)


class _SafeHeaders:
    """Every answer says what a browser may do with it: nothing but this page."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
            await send(message)

        await self.app(scope, receive, send_with_headers)


def _same_images(one: Served, other: Served) -> bool:
    return one.images.describe(Path()) == other.images.describe(Path())


def _values(found: Found) -> dict[str, Any]:
    """What one index found, without where it lies on this machine."""
    return {key: value for key, value in result_values(found).items() if key != "index"}


def _file(name: str, kind: str) -> Any:
    data = (_PAGE / name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(data, media_type=kind)

    return answer


async def _as_json(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)


async def _hidden(request: Request, error: Exception) -> Response:
    """What goes wrong here may name places on this machine: that is for whoever runs it."""
    print(f"error: {error}", file=sys.stderr)
    return JSONResponse({"error": "this cannot be answered; see where the page is served"}, status_code=500)


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

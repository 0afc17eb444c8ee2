"""Where the page and its feed are served: ``/``, ``/page/...`` and the stream of events ``/page/events``.

The page is fixed text without a secret in it and needs no API key; the events do, like every other answer of the
server. Nothing is looked up on disk after the start, so no path in a request can lead anywhere.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxpaged.serve.page.block_feed import BlockFeed, TooManyViewersError
from jaxpaged.serve.server.guards.errors import error_json

INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
RETRY_AFTER_SECONDS = 10


@dataclass(frozen=True)
class Asset:
    """A file of the page."""

    body: bytes
    media_type: str
    etag: str

    def response(self, request: Request) -> Response:
        """The file, or 304 where the browser has it."""
        headers = {**SECURITY_HEADERS, "ETag": self.etag, "Cache-Control": "no-cache"}
        known = request.headers.get("if-none-match", "")
        if self.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)


def load_assets() -> Mapping[str, Asset]:
    """The files of the page by name."""
    assets = {}
    for file in files("jaxpaged.serve.page.static").iterdir():
        media_type = MEDIA_TYPES.get(f".{file.name.rpartition('.')[2]}")
        if media_type is not None:
            body = file.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
            assets[file.name] = Asset(body, media_type, etag)
    return assets


def public_paths() -> tuple[str, ...]:
    """What a browser has to get without an API key; the events are not among it."""
    return ("/", *(f"/page/{name}" for name in sorted(load_assets()) if name != INDEX))


def page_routes(feed: BlockFeed) -> APIRouter:
    """Routes of the page over a feed; they are no part of the API and of its schema."""
    assets = load_assets()
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return assets[INDEX].response(request)

    @router.get("/page/events")
    async def events() -> Response:
        return EventStream(feed)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def asset(name: str, request: Request) -> Response:
        found = assets.get(name)
        if found is None or name == INDEX:
            return _error(404, f"there is no {request.url.path!r:.200}")
        return found.response(request)

    return router


class EventStream(Response):
    """A feed as server-sent events, until the client goes or the feed ends."""

    def __init__(self, feed: BlockFeed) -> None:
        super().__init__()
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Watches from the first byte to the last, and no longer."""
        try:
            viewer = self._feed.watch()
        except TooManyViewersError as error:
            await _error(503, str(error), {"Retry-After": str(RETRY_AFTER_SECONDS)})(scope, receive, send)
            return
        # No proxy is to collect events before it passes them on.
        headers = {**SECURITY_HEADERS, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        try:
            response = StreamingResponse(viewer, media_type="text/event-stream", headers=headers)
            await response(scope, receive, send)
        finally:
            viewer.close()


def _error(status: int, message: str, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    body = error_json(status, message)
    return Response(body, status, {**SECURITY_HEADERS, **headers}, media_type="application/json")

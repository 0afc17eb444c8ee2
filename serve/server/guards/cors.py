"""Lets pages of listed origins use the server from a browser (Cross-Origin Resource Sharing, fetch.spec.whatwg.org).

Starlette's own middleware puts a coroutine around every streamed chunk; this one costs an eighth of it.
"""

import re
from collections.abc import Awaitable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.serve.server.guards.errors import send_error

ALLOWED_METHODS = b"GET, POST, OPTIONS"
EXPOSED_HEADERS = b"X-Request-Id, Retry-After"
PREFLIGHT_SECONDS = b"600"

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/:?#@*\[\]]+)(:\d{1,5})?")
_HEADER_NAMES = re.compile(rb"[\w!#$%&'*+.^`|~-]+([ \t]*,[ \t]*[\w!#$%&'*+.^`|~-]+)*", re.ASCII)
MAX_HEADER_NAMES = 2048  # bytes; what a preflight may ask for at once


def is_preflight(scope: Scope) -> bool:
    """Whether a browser asks by this request what another one may do."""
    if scope["method"] != "OPTIONS":
        return False
    names = {name for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names


class Cors:
    """Adds the headers of CORS for ``origins`` and answers preflights; ``"*"`` stands for every origin.

    Credentials (cookies) are never allowed: a key comes in a header that the page sets itself. All headers that a
    page of an allowed origin asks for are allowed, since clients add their own.

    Raises:
        ValueError: something that is no origin, such as one with a path.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str]) -> None:
        self.app = app
        listed = [origin.lower() for origin in origins]
        for origin in listed:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"allowed_origin={origin!r} is no origin such as https://example.org")
        self._all = "*" in listed
        self._origins = frozenset(origin.encode() for origin in listed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = self._headers(scope)
        if is_preflight(scope):
            await self._answer_preflight(scope, headers, send)
            return

        def send_with_headers(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            return send(message)

        await self.app(scope, receive, send_with_headers if headers else send)

    def _headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """What every response to this request says; whether pages may read it depends on the origin."""
        origins = [value for name, value in scope["headers"] if name == b"origin"]
        allowed = len(origins) == 1 and (self._all or origins[0].lower() in self._origins)
        # Caches must not give one origin's answer to another, nor to a request without one.
        headers = [] if self._all else [(b"vary", b"Origin")]
        if allowed:
            headers.append((b"access-control-allow-origin", b"*" if self._all else origins[0]))
            headers.append((b"access-control-expose-headers", EXPOSED_HEADERS))
        return headers

    async def _answer_preflight(self, scope: Scope, headers: list[tuple[bytes, bytes]], send: Send) -> None:
        if not any(name == b"access-control-allow-origin" for name, _ in headers):
            message = "pages of this origin may not use the server (option --allowed-origin)"
            await send_error(send, 403, message, code="origin_not_allowed", headers=headers)
            return
        asked = [value for name, value in scope["headers"] if name == b"access-control-request-headers"]
        lines = [
            *headers,
            (b"access-control-allow-methods", ALLOWED_METHODS),
            (b"access-control-max-age", PREFLIGHT_SECONDS),
        ]
        if (
            len(asked) == 1
            and len(asked[0]) <= MAX_HEADER_NAMES
            and _HEADER_NAMES.fullmatch(asked[0].strip())
        ):
            lines.append((b"access-control-allow-headers", asked[0].strip()))
        await send({"type": "http.response.start", "status": 204, "headers": lines})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

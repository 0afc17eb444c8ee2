"""Reads a request's body within bounds of size and time before the application sees the request."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.serve.server.guards.errors import Header, error_headers, error_json

MAX_BODY_BYTES = 16 << 20
MAX_TOTAL_BODY_BYTES = 256 << 20
BODY_TIMEOUT = 60.0

# After a refusal, what the client still sends is read and thrown away for a while: closing a connection that has
# unread data resets it, and the client might lose the answer that tells it what was wrong.
DRAIN_TIMEOUT = 2.0
DRAIN_BYTES = 32 << 20

_JSON_METHODS = ("POST", "PUT", "PATCH")


class Refusal(Exception):
    """A body that is not read (to its end): the answer to it."""

    def __init__(self, status: int, message: str, headers: Sequence[Header] = ()) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class ClientGone(Exception):
    """The connection ended within the body."""


class BodyLimit:
    """Hands requests on with their whole body, or answers what is wrong with it and closes the connection.

    413: more than ``max_body_bytes``, by its Content-Length or as it comes. 408: not there within ``body_timeout``
    seconds. 415: a Content-Encoding, or, for POST, PUT and PATCH (even without a body), a Content-Type other than
    application/json in UTF-8; a browser sends that type to other sites only if they allow it, so that no page can
    use the server unasked. 501: a Transfer-Encoding other than chunked. 503: the bodies that are being read take
    ``max_total_body_bytes``. Invariant: ``num_buffered_bytes`` is the sum of all incomplete bodies.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_total_body_bytes: int = MAX_TOTAL_BODY_BYTES,
        body_timeout: float = BODY_TIMEOUT,
        drain_timeout: float = DRAIN_TIMEOUT,
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_total_body_bytes = max_total_body_bytes
        self.body_timeout = body_timeout
        self.drain_timeout = drain_timeout
        self.num_buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            has_body = self._check_headers(scope)
            body = await self._read(receive) if has_body else b""
        except Refusal as refusal:
            await self._refuse(refusal, receive, send)
        except ClientGone:
            return
        else:
            await self.app(scope, _whole(body, receive) if has_body else receive, send)

    def _check_headers(self, scope: Scope) -> bool:
        """Whether the request has a body; raises Refusal."""
        length, chunked = 0, False
        content_type = b""
        for name, value in scope["headers"]:
            if name == b"content-length":
                length = _content_length(value)
            elif name == b"transfer-encoding":
                chunked = True
                if value.strip().lower() != b"chunked":
                    raise Refusal(
                        501, "the Transfer-Encoding of a request has to be chunked, if there is one"
                    )
            elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                headers = [(b"accept-encoding", b"identity")]
                raise Refusal(415, "a body with a Content-Encoding is not accepted: send it plain", headers)
            elif name == b"content-type":
                content_type = value
        if scope["method"] in _JSON_METHODS and not _is_json(content_type):
            raise Refusal(415, "the Content-Type has to be application/json, in UTF-8")
        if length > self.max_body_bytes:
            raise self._too_large()
        return chunked or length > 0

    async def _read(self, receive: Receive) -> bytes:
        """The whole body; raises Refusal or ClientGone."""
        body, more = (
            bytearray(),
            True,
        )  # no list of parts: a million of two bytes would take forty times their size
        try:
            async with asyncio.timeout(self.body_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    more = message.get("more_body", False)
                    body += part
                    self.num_buffered_bytes += len(part)
                    if len(body) > self.max_body_bytes:
                        raise self._too_large()
                    if self.num_buffered_bytes > self.max_total_body_bytes:
                        raise Refusal(503, "too many bodies are being read", [(b"retry-after", b"1")])
        except TimeoutError:
            text = f"the body did not arrive within {self.body_timeout:g} seconds"
            raise Refusal(408, text) from None
        finally:
            self.num_buffered_bytes -= len(body)
        return bytes(body)

    async def _refuse(self, refusal: Refusal, receive: Receive, send: Send) -> None:
        """Answers at once, and ends the response when the client has sent its body or a bound is reached."""
        body = error_json(refusal.status, refusal.message)
        headers = error_headers(body, refusal.headers, close=True)
        await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        left, more = DRAIN_BYTES, True
        with suppress(TimeoutError):
            async with asyncio.timeout(self.drain_timeout):
                while more and left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    more = message.get("more_body", False)  # and none after a disconnect
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self.max_body_bytes} bytes")


def _content_length(value: bytes) -> int:
    digits = value.strip()
    if not digits.isdigit() or len(digits) > 20:
        raise Refusal(400, "the Content-Length is no number of bytes")
    return int(digits)


def _is_json(content_type: bytes) -> bool:
    media_type, *parameters = content_type.lower().split(b";")
    if media_type.strip() != b"application/json":
        return False
    for parameter in parameters:
        name, _, value = parameter.strip().partition(b"=")
        if name == b"charset" and value.strip(b'"') not in (b"utf-8", b"utf8", b"us-ascii"):
            return False
    return True


def _whole(body: bytes, receive: Receive) -> Receive:
    """``receive`` of a request whose body has been read."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_whole() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_whole

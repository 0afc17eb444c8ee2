"""Gives every request an id, the client's own where it is well formed, and returns it with the answer."""

import re
import secrets
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"x-request-id"

# Visible ASCII: such an id can stand in a log line, in a header and in a file name's place without harm.
_WELL_FORMED = re.compile(rb"[\x21-\x7e]{1,128}")


def new_request_id() -> str:
    """``req-`` and 128 random bits in hexadecimal."""
    return f"req-{secrets.token_hex(16)}"


def requested_id(scope: Scope) -> str | None:
    """The client's X-Request-Id: 1 to 128 visible ASCII characters, sent once; None if there is no such id."""
    values = [value for name, value in scope["headers"] if name == HEADER]
    if len(values) == 1 and _WELL_FORMED.fullmatch(values[0]):
        return str(values[0], "ascii")
    return None


class RequestId:
    """Puts the id into ``scope["state"]["request_id"]`` and into the response's header X-Request-Id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = requested_id(scope) or new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        line = (HEADER, request_id.encode("ascii"))

        # No coroutine of its own: a streamed chunk costs a call here, not a frame to run through at each await.
        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if not any(name.lower() == HEADER for name, _ in headers):
                    message = {**message, "headers": [*headers, line]}
            return send(message)

        await self.app(scope, receive, send_with_id)

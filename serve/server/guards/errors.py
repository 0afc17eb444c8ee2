"""The error objects of the OpenAI API, as a mapping, as JSON, as an ASGI answer and as a whole HTTP response."""

import json
import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

from starlette.types import Send

MAX_MESSAGE = 2000  # characters; what a message quotes of a request is not bounded otherwise
MAX_PARAM = 200

Header = tuple[bytes, bytes]

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

# A key that a client put into the wrong place must not come back in an answer that somebody logs.
_SECRET = re.compile(r"(\bbearer\s+)[^\s\"',;]+|\bsk-[\w-]{8,}", re.IGNORECASE)


def error_type(status: int) -> str:
    """The ``type`` that goes with an HTTP status."""
    if status in ERROR_TYPES:
        return ERROR_TYPES[status]
    return "server_error" if status >= 500 else "invalid_request_error"


def error_body(
    message: str,
    type: str = "invalid_request_error",
    param: str | None = None,
    code: str | int | None = None,
) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``; the message bounded and without API keys."""
    return {"error": {"message": _presentable(message), "type": type, "param": _cut(param), "code": code}}


def openai_error(
    status: int,
    message: str,
    type: str | None = None,
    param: str | None = None,
    code: str | int | None = None,
) -> dict[str, Any]:
    """``error_body`` with the type that goes with ``status``, unless another one is named."""
    return error_body(message, type or error_type(status), param, code)


def error_json(
    status: int,
    message: str,
    type: str | None = None,
    param: str | None = None,
    code: str | int | None = None,
) -> bytes:
    """``openai_error`` as ASCII JSON: control characters and lone surrogates are escaped, none is dropped."""
    return json.dumps(openai_error(status, message, type, param, code)).encode("ascii")


def error_headers(body: bytes, headers: Iterable[Header] = (), *, close: bool = False) -> list[Header]:
    """The header lines of an answer whose body is an error."""
    lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    if close:
        lines.append((b"connection", b"close"))
    return lines


async def send_error(
    send: Send,
    status: int,
    message: str,
    *,
    type: str | None = None,
    param: str | None = None,
    code: str | int | None = None,
    headers: Iterable[Header] = (),
    close: bool = False,
) -> None:
    """Answers an HTTP request with an error object; ``close`` ends the connection after it."""
    body = error_json(status, message, type, param, code)
    lines = error_headers(body, headers, close=close)
    await send({"type": "http.response.start", "status": status, "headers": lines})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def error_response(status: int, message: str, headers: Sequence[Header] = ()) -> bytes:
    """A whole HTTP/1.1 response that ends the connection, for when there is no request to answer."""
    body = error_json(status, message)
    lines = error_headers(body, headers, close=True)
    head = b"HTTP/1.1 %d %s\r\n" % (status, HTTPStatus(status).phrase.encode("ascii"))
    return head + b"".join(b"%s: %s\r\n" % line for line in lines) + b"\r\n" + body


def _presentable(message: str) -> str:
    shown = _SECRET.sub(lambda match: f"{match[1] or ''}[redacted]", message[:MAX_MESSAGE])
    omitted = len(message) - MAX_MESSAGE
    return f"{shown}... ({omitted} more characters)" if omitted > 0 else shown


def _cut(param: str | None) -> str | None:
    return param if param is None else param[:MAX_PARAM]

"""What a failing request is answered with: status, error object, headers."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.errors import InvalidRequestError, PromptTooLongError, RequestTooLargeError
from jaxpaged.serve.engine_errors import EngineUnavailableError, QueueFullError
from jaxpaged.serve.server.guards.errors import error_json, error_type

logger = logging.getLogger(__name__)

RETRY_WHEN_UNAVAILABLE = 5  # seconds


class RequestFailure(Exception):
    """A request that is answered with an error.

    Attributes:
      status: of HTTP.
      message, param, code: of the error object.
      retry_after: seconds after which to try again; None for no advice.
      reason: one of a few words, for the metrics.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.reason = reason or code or error_type(status)

    def body(self) -> bytes:
        """The error object as JSON."""
        return error_json(self.status, self.message, param=self.param, code=self.code)

    def response(self) -> Response:
        """The answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(math.ceil(self.retry_after))}
        return Response(self.body(), self.status, headers, media_type="application/json")


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


def failure_of(error: BaseException) -> RequestFailure:
    """What to answer when ``error`` ends a request."""
    if isinstance(error, RequestFailure):
        return error
    if isinstance(error, InvalidRequestError):
        is_too_long = isinstance(error, PromptTooLongError | RequestTooLargeError)
        code = "context_length_exceeded" if is_too_long else None
        return RequestFailure(400, str(error), param=error.argument, code=code)
    if isinstance(error, QueueFullError):
        return RequestFailure(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineUnavailableError):
        code = type(error).__name__.removesuffix("Error")
        code = "".join(f"_{char.lower()}" if char.isupper() else char for char in code).strip("_")
        return RequestFailure(503, str(error), code=code, retry_after=RETRY_WHEN_UNAVAILABLE)
    # What is wrong inside is for the log, not for whoever asked.
    return RequestFailure(500, f"the request failed: {type(error).__name__}", code="request_failed")


def validation_failure(error: RequestValidationError) -> RequestFailure:
    """A body that is no JSON or does not fit; names the first field that is wrong."""
    found: Mapping[str, Any] = next(iter(error.errors()), {"loc": (), "msg": "is malformed", "type": ""})
    place = [str(part) for part in found["loc"] if part != "body"]
    if found["type"] == "json_invalid":
        return RequestFailure(400, f"the body is not JSON: {found.get('ctx', {}).get('error', 'malformed')}")
    if found["type"] == "extra_forbidden":
        return RequestFailure(
            400,
            f"unrecognized request argument: {'.'.join(place)}",
            param=".".join(place),
            code="unknown_parameter",
        )
    name = ".".join(place) or "body"
    shown = f"={found['input']!r:.80}" if "input" in found and found["type"] != "missing" else ""
    return RequestFailure(400, f"{name}{shown}: {found['msg']}", param=name)


def contain_failures(app: ASGIApp) -> ASGIApp:
    """Keeps from the server what ``app`` raises after it has been answered: the server would reset the connection."""

    async def contained(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watching_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, watching_send)
        except Exception:
            if not started or scope["type"] != "http":
                raise

    return contained


def install_failure_handlers(app: FastAPI, refused: Callable[[str], None]) -> None:
    """Has every error answered by an error object of OpenAI's form; ``refused`` is told the reasons."""

    def answer(failure: RequestFailure) -> Response:
        if failure.status != 404:
            refused(failure.reason)
        return failure.response()

    async def on_failure(_: Request, error: Exception) -> Response:
        return answer(failure_of(error))

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError), "registered for it"
        return answer(validation_failure(error))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for it"
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path!r:.200}"
        response = RequestFailure(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    async def on_client_left(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # goes nowhere

    async def on_error(request: Request, error: Exception) -> Response:
        logger.error("request %s failed", request.scope["state"].get("request_id"), exc_info=error)
        return answer(failure_of(error))

    for kind in (RequestFailure, InvalidRequestError, EngineUnavailableError, QueueFullError):
        app.add_exception_handler(kind, on_failure)
    app.add_exception_handler(ClientLeftError, on_client_left)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)

"""Measures each request and tells how it ended, for the access log and the metrics."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

UNMATCHED = (
    "unmatched"  # one name for all paths without a route: a metric's label must not grow with what is asked
)
CLIENT_CLOSED_REQUEST = 499  # what nginx's log says when the client left before there was an answer


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """How one HTTP request went.

    ``seconds`` is from its headers to the end of its response. ``status`` is 499 if the client left before the
    response began, and 500 if it failed before. ``details`` is what handlers put into ``scope["state"]["access"]``.
    """

    method: str
    route: str  # the template, such as /v1/models/{name}
    status: int
    seconds: float
    client: str | None  # address without the port; None on a Unix socket
    request_id: str | None
    disconnected: bool  # the client left before the end of the response
    details: Mapping[str, Any]


class Access:
    """Calls ``on_end(RequestSummary)`` after each HTTP request; an error that it raises is logged.

    A client that leaves is noticed where the handler awaits ``receive``. One that only sends has to set
    ``scope["state"]["access"]["disconnected"] = True`` if it finds out otherwise.
    """

    def __init__(self, app: ASGIApp, on_end: Callable[[RequestSummary], None]) -> None:
        self.app = app
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        scope.setdefault("state", {})["access"] = {}
        status, complete, disconnected = 0, False, False

        def watching_send(message: Message) -> Awaitable[None]:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body", False):
                complete = True
            return send(message)

        async def watching_receive() -> Message:
            nonlocal disconnected
            message = await receive()
            # Servers say the same after a complete response.
            if message["type"] == "http.disconnect" and not complete:
                disconnected = True
            return message

        try:
            await self.app(scope, watching_receive, watching_send)
        finally:
            self._tell(scope, status, time.perf_counter() - start, disconnected)

    def _tell(self, scope: Scope, status: int, seconds: float, disconnected: bool) -> None:
        state, client = scope["state"], scope.get("client")
        disconnected = disconnected or bool(state["access"].get("disconnected"))
        summary = RequestSummary(
            method=scope["method"],
            route=getattr(scope.get("route"), "path", UNMATCHED),
            status=status or (CLIENT_CLOSED_REQUEST if disconnected else 500),
            seconds=seconds,
            client=client[0] if client else None,
            request_id=state.get("request_id"),
            disconnected=disconnected,
            details=state["access"],
        )
        try:
            self.on_end(summary)
        except Exception:
            logger.exception("the end of request %s could not be told", summary.request_id)

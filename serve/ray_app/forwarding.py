"""An HTTP request on its way from the ingress to a replica, and its answer on the way back.

The answer comes as a ``Head`` and then as pieces of its body, plain bytes, which Ray carries cheapest.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.serve.server.guards.request_id import HEADER as REQUEST_ID

logger = logging.getLogger(__name__)

# What of an ASGI scope can be sent to another process.
_CARRIED = (
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path"),
    *("query_string", "root_path", "headers", "client", "server"),
)
# What the guards found out, for the application.
_FOUND = ("tenant",)
Headers = list[tuple[bytes, bytes]]


class Head(NamedTuple):
    """The beginning of an answer."""

    status: int
    headers: Headers


@dataclass(frozen=True)
class ForwardedRequest:
    """A request whose body has been read."""

    scope: dict[str, Any]
    body: bytes

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> "ForwardedRequest":
        """The request of ``scope``, under the id that the guards gave it."""
        carried = {name: scope[name] for name in _CARRIED if name in scope}
        headers = [(name, value) for name, value in scope["headers"] if name != REQUEST_ID]
        state = scope["state"]
        carried["headers"] = [*headers, (REQUEST_ID, state["request_id"].encode("ascii"))]
        carried["state"] = {name: state[name] for name in _FOUND if name in state}
        return cls(carried, body)

    @property
    def path(self) -> str:
        """The path below the prefix that the application is served at."""
        return str(self.scope["path"]).removeprefix(str(self.scope.get("root_path", "")).rstrip("/"))

    @property
    def tenant(self) -> str:
        """Whose key it came with; empty if there is only one key, or none."""
        return str(self.scope["state"].get("tenant", ""))

    @property
    def request_id(self) -> str:
        """The id that the guards gave it."""
        return next(str(value, "ascii") for name, value in self.scope["headers"] if name == REQUEST_ID)


class Responder:
    """Runs requests through an ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._tasks: set[asyncio.Task[None]] = set()  # the event loop itself keeps no hold of them

    async def respond(self, request: ForwardedRequest) -> AsyncGenerator[Head | bytes]:
        """The head of the answer, then its body as it comes.

        To close this is, for the application, a client that leaves. What the application sends waits here without a
        bound for whoever asks for the next piece: Ray asks at once and has no way to ask for less.
        """
        sent: list[Message] = []
        news, left = asyncio.Event(), asyncio.Event()
        waiting: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            news.set()

        scope = {**request.scope, "state": dict(request.scope["state"])}
        task = asyncio.create_task(self._run(scope, receive, send))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        task.add_done_callback(lambda _: news.set())
        try:
            more = True
            while more:
                await news.wait()
                news.clear()
                arrived, sent[:] = sent[:], []
                for part in _parts(arrived):
                    yield part
                more = not any(map(_is_last, arrived))
                if more and task.done() and not sent:
                    raise RuntimeError("the application ended before its answer") from _error_of(task)
        finally:
            left.set()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if (error := _error_of(task)) is not None:
            logger.debug("the application raised after its answer", exc_info=error)


def _error_of(task: asyncio.Task[None]) -> BaseException | None:
    return None if task.cancelled() else task.exception()


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def _parts(messages: list[Message]) -> list[Head | bytes]:
    """What was sent, all pieces of the body that are there as one."""
    heads: list[Head | bytes] = [
        Head(message["status"], [(bytes(name), bytes(value)) for name, value in message.get("headers", ())])
        for message in messages
        if message["type"] == "http.response.start"
    ]
    body = b"".join(message.get("body", b"") for message in messages)
    return [*heads, body] if body else heads

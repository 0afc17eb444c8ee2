"""Answers as server-sent events, and waiting for an answer that nobody may be left to read.

Written on bare ASGI: an event costs one call of ``send``. A reader that is slow makes ``send`` wait, and what the
engine brings meanwhile is merged into one output (``OutputStream``).
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxpaged.serve.server.failures import ClientLeftError

T = TypeVar("T")
Write = Callable[[bytes], Awaitable[None]]

_SERVER_SEND = "server_send"  # where the server's own ``send`` lies in a scope's state
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies pass each event on at once
}


def event(data: bytes) -> bytes:
    """One event; ``data`` has no line breaks, which JSON never needs."""
    return b"data: " + data + b"\n\n"


def with_short_way(app: ASGIApp) -> ASGIApp:
    """Lets chunks of streams go to the server past what lies around the application.

    Only the first and the last message of an answer concern it: with each layer a chunk costs a microsecond more.
    """

    async def outermost(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})[_SERVER_SEND] = send
        await app(scope, receive, send)

    return outermost


class EventStream(Response):
    """Runs ``produce(write)``, whose events are the body; a client that leaves cancels it.

    ``produce`` answers its own failures, by an event: the status has long been sent.
    """

    def __init__(
        self, produce: Callable[[Write], Coroutine[Any, Any, None]], headers: Mapping[str, str] = HEADERS
    ) -> None:
        super().__init__(None, 200, headers)
        self.raw_headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        send_chunk = scope["state"].get(_SERVER_SEND, send)

        def write(data: bytes) -> Awaitable[None]:
            return send_chunk({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await unless_client_leaves(receive, self._produce(write))
        except ClientLeftError:
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_client_leaves[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client leaves first.

    It runs in a task of its own: each time that a coroutine goes on, Python passes through all that wait for it, and
    around a route there are some thirty.

    Raises:
      ClientLeftError: the client left first.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_client_left(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _client_left(receive: Receive) -> None:
    """Returns when the client has gone; what it still sends is dropped."""
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return

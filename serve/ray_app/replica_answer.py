"""What a replica answers, at the ingress: when it begins, what it is, and how it ends if the replica does."""

import asyncio
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import RayServeException
from starlette.types import Send

from jaxpaged.serve.ray_app.forwarding import Head
from jaxpaged.serve.server.event_stream import DONE, event
from jaxpaged.serve.server.guards.errors import error_json

REPLICA = b"x-jaxpaged-replica"  # header of an answer: who gave it


class ReplicaLostError(Exception):
    """The replica ended, or could not be reached, before the answer was complete."""


class ReplicaFailedError(Exception):
    """Something went wrong in the replica, or in Ray, that another replica would not mend."""


class ReplicaAnswer:
    """The answer to one request.

    Args:
      parts: Ray's stream of what ``Replica.respond`` yields.
    """

    def __init__(self, parts: Any) -> None:
        self._parts = parts
        self._ended = False
        self._body = b""
        self.replica = ""
        self.head = Head(0, [])

    @property
    def _is_stream(self) -> bool:
        headers = self.head.headers
        return any(n.lower() == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)

    async def begin(self, wait: float) -> None:
        """Waits until a replica has taken the request, at most ``wait`` seconds, and then for the head.

        What is no stream of events is waited for to its end, so that until here nothing has been sent.

        Raises:
          TimeoutError: there is no replica that would take it.
          ReplicaLostError, ReplicaFailedError: it has no answer.
        """
        async with asyncio.timeout(wait):
            self.replica = await self._next()
        self.head = Head(*await self._next())
        while not self._is_stream and not self._ended:
            self._body += await self._next()

    async def send_to(self, send: Send) -> None:
        """Sends it. A stream that breaks off ends with an event that says so, as those of an engine that fails do."""
        headers = [*self.head.headers, (REPLICA, self.replica.encode())]
        await send({"type": "http.response.start", "status": self.head.status, "headers": headers})
        data = self._body
        try:
            while not self._ended:
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                data = await self._next()
        except ReplicaLostError:
            data = _failure(503, "the replica ended before the answer was complete", "replica_lost")
        except ReplicaFailedError:
            data = _failure(500, "the request failed in its replica", "request_failed")
        await send({"type": "http.response.body", "body": data, "more_body": False})

    def close(self) -> None:
        """Ends what is left of it; the replica's engine stops computing it."""
        if not self._ended:
            self._ended = True
            self._parts.cancel()

    async def _next(self) -> Any:
        """The next part; nothing, as bytes, at the end."""
        try:
            return await anext(self._parts)
        except StopAsyncIteration:
            self._ended = True
            return b""
        except RayActorError as error:
            self._ended = True
            raise ReplicaLostError(type(error).__name__) from error
        except (RayError, RayServeException) as error:
            self._ended = True
            raise ReplicaFailedError(type(error).__name__) from error


def _failure(status: int, message: str, code: str) -> bytes:
    return event(error_json(status, message, code=code)) + DONE

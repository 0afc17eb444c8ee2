"""The way in: guards requests, sends each to the replica that fits, and passes the answer through as it comes."""

import json
import logging
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxpaged.serve.prefix_routing import body_keys
from jaxpaged.serve.ray_app.forwarding import ForwardedRequest
from jaxpaged.serve.ray_app.merged_metrics import merge_metrics
from jaxpaged.serve.ray_app.refusals import RefusalCounter
from jaxpaged.serve.ray_app.replica_answer import ReplicaAnswer, ReplicaFailedError, ReplicaLostError
from jaxpaged.serve.server.event_stream import unless_client_leaves
from jaxpaged.serve.server.failures import RETRY_WHEN_UNAVAILABLE
from jaxpaged.serve.server.guard_options import guard_options
from jaxpaged.serve.server.guards.errors import send_error
from jaxpaged.serve.server.guards.request_id import HEADER as REQUEST_ID
from jaxpaged.serve.server.guards.stack import guard
from jaxpaged.serve.server.options import ServerOptions

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
# A probe wants to know now.
HEALTH_WAIT = 1.0
METRICS_WAIT = 10.0


class Ingress:
    """What Ray's proxies send requests to.

    A request whose replica dies before the answer has begun goes to another one. One that has begun ends with an
    event that says so, if it is a stream, or else with its connection.

    Args:
      replicas: the deployment of ``Replica``.
      options: of the server.
      names: of the model.
      replica_wait: seconds a request waits for a replica.
    """

    def __init__(
        self, replicas: DeploymentHandle, options: ServerOptions, names: Sequence[str], replica_wait: float
    ) -> None:
        self._replicas = replicas
        self._respond = replicas.options(method_name="respond", stream=True)
        self._replica_wait = replica_wait
        self._share_prefixes = options.share_prefixes
        self._refusals = RefusalCounter(
            names[0], f"ingress-{serve.get_replica_context().replica_tag}", options
        )
        self._asgi = guard(self._answer, guard_options(options), on_end=self._refusals.ended)

    async def __call__(self, request: Request) -> Response:
        """Ray calls it with a request whose body has not been read, and runs what it returns as ASGI."""
        return _Answer(self)

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""

        async def send_with_rays_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                # Ray's proxy adds the request's id by itself, and would not look whether it is there.
                headers = [(name, value) for name, value in message["headers"] if name.lower() != REQUEST_ID]
                message = {**message, "headers": headers}
            await send(message)

        await self._asgi(scope, receive, send_with_rays_id)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request that the guards have let in."""
        scope["state"]["access"]["forwarded"] = True
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        request = ForwardedRequest.of(scope, body)
        metrics = scope["method"] == "GET" and request.path == "/metrics"
        await unless_client_leaves(receive, (self._collect if metrics else self._relay)(request, send))

    async def _relay(self, request: ForwardedRequest, send: Send) -> None:
        has_prompt = request.scope["method"] == "POST" and request.path.startswith("/v1/")
        # Tenants that share no blocks need not meet.
        keys = body_keys(request.body, "" if self._share_prefixes else request.tenant) if has_prompt else ()
        wait = HEALTH_WAIT if request.path == "/health" else self._replica_wait
        avoid: list[str] = []
        for attempts_left in range(MAX_ATTEMPTS - 1, -1, -1):
            answer = ReplicaAnswer(self._respond.remote(request, keys=keys, avoid=tuple(avoid)))
            try:
                await answer.begin(wait)
                # An engine that is dead or ends says so; another may do better.
                if answer.head.status != 503 or not attempts_left:
                    await answer.send_to(send)
                    return
            except TimeoutError:
                break
            except ReplicaLostError as error:
                logger.warning("request %s loses its replica: %s", request.request_id, error)
            except ReplicaFailedError:
                logger.exception("request %s failed in replica %s", request.request_id, answer.replica)
                await send_error(send, 500, "the request failed in its replica", code="request_failed")
                return
            finally:
                answer.close()
            if answer.replica:
                avoid.append(answer.replica)
        await _send_unavailable(request, send)

    async def _collect(self, request: ForwardedRequest, send: Send) -> None:
        """The metrics of all replicas, and of this ingress, in the text format whatever was asked for."""
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"accept"]
        request = ForwardedRequest({**request.scope, "headers": headers}, request.body)
        try:
            answers = await self._replicas.broadcast("respond_whole", request).results_async(
                timeout_s=METRICS_WAIT, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError):
            answers = []
        given = {
            a[0]: a[2].decode() for a in answers if not isinstance(a, BaseException) and a[1].status == 200
        }
        body = merge_metrics(given | {self._refusals.name: self._refusals.render()}).encode()
        line = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": 200, "headers": [line, length]})
        await send({"type": "http.response.body", "body": body, "more_body": False})


class _Answer(Response):
    """Lets an ingress answer over bare ASGI."""

    def __init__(self, ingress: Ingress) -> None:
        super().__init__()
        self._ingress = ingress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._ingress.run(scope, receive, send)


async def _send_unavailable(request: ForwardedRequest, send: Send) -> None:
    headers = [(b"retry-after", b"%d" % RETRY_WHEN_UNAVAILABLE)]
    if request.path == "/health":
        body = json.dumps({"status": "starting"}).encode()
        headers += [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
    else:
        text = "no replica takes requests now"
        await send_error(send, 503, text, code="engine_not_ready", headers=headers)

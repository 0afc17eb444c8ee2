"""One replica: the server's whole application over an engine of its own, in a process that Ray starts."""

import dataclasses
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack

from ray import serve

from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.engine_errors import EngineDeadError
from jaxpaged.serve.engine_state import EngineState
from jaxpaged.serve.options import EngineOptions
from jaxpaged.serve.ray_app.autoscaling import SEQUENCES
from jaxpaged.serve.ray_app.forwarding import ForwardedRequest, Head, Responder
from jaxpaged.serve.server.app import build_app
from jaxpaged.serve.server.options import ServerOptions
from jaxpaged.serve.server.run import engine_maker

logger = logging.getLogger(__name__)


class Replica:
    """What Ray Serve runs as a replica. It takes requests once its engine has loaded and compiled.

    Raises:
      EngineDeadError: the engine could not be started; ``__cause__`` says why.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, engine: EngineOptions, options: ServerOptions, names: Sequence[str]
    ) -> None:
        self.name = serve.get_replica_context().replica_tag
        options = options_of_replica(options, self.name)
        self._engine = AsyncEngine(engine_maker(options, engine), max_queue_length=options.max_queue_length)
        self._drain_timeout = options.drain_timeout
        application = build_app(self._engine, options, names, behind_ingress=True)
        self._responder = Responder(application.asgi)
        self._running = AsyncExitStack()
        self._running.push_async_callback(self._engine.close)
        try:
            await self._running.enter_async_context(application.app.router.lifespan_context(application.app))
            await self._engine.wait_ready()
        except BaseException:
            await self._running.aclose()
            raise
        logger.info("replica %s is ready after %.1f s", self.name, self._engine.progress.seconds)

    async def respond(
        self, request: ForwardedRequest, keys: Sequence[int] = (), avoid: Sequence[str] = ()
    ) -> AsyncGenerator[str | Head | bytes]:
        """This replica's name at once, then the answer: its head and the pieces of its body.

        ``keys`` and ``avoid`` are for the router, which has read them by now.
        """
        yield self.name
        async for part in self._responder.respond(request):
            yield part

    async def respond_whole(self, request: ForwardedRequest) -> tuple[str, Head, bytes]:
        """This replica's name, and its whole answer to a request that all replicas get."""
        head, body = None, bytearray()
        async for part in self._responder.respond(request):
            if isinstance(part, Head):
                head = part
            else:
                body += part
        assert head is not None, "an answer without a head"
        return self.name, head, bytes(body)

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if self._engine.state in (EngineState.DEAD, EngineState.CLOSED):
            raise EngineDeadError(f"the engine is {self._engine.state}") from self._engine.error

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What ``wanted_replicas`` goes by."""
        return {SEQUENCES: self._engine.num_unfinished}

    async def __del__(self) -> None:
        """Ray awaits it when the replica is to stop, and what was under way has ended."""
        await self._engine.drain(self._drain_timeout)
        await self._running.aclose()


def options_of_replica(options: ServerOptions, name: str) -> ServerOptions:
    """The options of one of several servers behind an ingress, which alone has the keys."""
    has_keys = bool(options.api_key or options.api_key_file)
    board = None if options.tensorboard is None else options.tensorboard / name
    # That there are keys is for the schema to tell; which, is not known here.
    keys = ["known-to-the-ingress"] if has_keys else None
    return dataclasses.replace(options, api_key=keys, api_key_file=None, tensorboard=board)

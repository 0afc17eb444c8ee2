"""``jaxpaged serve``: listens at once, loads and compiles meanwhile, and on SIGTERM lets requests end first."""

import asyncio
import dataclasses
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from jaxpaged import Engine
from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.engine_errors import EngineUnavailableError
from jaxpaged.serve.engine_thread import EngineState, StartProgress
from jaxpaged.serve.options import EngineOptions
from jaxpaged.serve.server.app import Application, build_app
from jaxpaged.serve.server.guards.connection import limited_protocol
from jaxpaged.serve.server.guards.connection_limits import ConnectionLimits
from jaxpaged.serve.server.options import ServerOptions
from jaxpaged.serve.terminal import stderr
from jaxpaged.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BACKLOG = 2048
# Connections end by themselves once their answers have been sent; after so many seconds they are closed.
CLOSE_TIMEOUT = 5
# Longer than clients keep a connection in their pools, so that they do not send on one that is just being closed.
KEEP_ALIVE_TIMEOUT = 75
MAX_OPEN_FILES = 65536
# Signals so close to each other are one: a shell's Ctrl-C and ``timeout`` reach a process by two ways.
SAME_SIGNAL_SECONDS = 0.5


def run_serve(options: ServerOptions, engine_options: EngineOptions) -> None:
    """Serves until a signal ends it.

    Raises:
      ValueError: an option is wrong, or the address cannot be listened at.
      EngineDeadError: the engine could not be started, or failed for good.
    """
    sock = listening_socket(options.host, options.port)
    allow_open_files()
    engine = AsyncEngine(engine_maker(options, engine_options), max_queue_length=options.max_queue_length)
    try:
        application = build_app(engine, options, served_names(options, engine_options))
        server = Server(application, options, owns_process=True)
        host, port = sock.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        stderr().print(f"listening at http://{shown}:{port}", markup=False, highlight=False, soft_wrap=True)
        server.run(sockets=[sock])
        if server.failure is not None:
            raise server.failure
    finally:
        sock.close()
        asyncio.run(engine.close())


def allow_open_files() -> None:
    """Lets the process have as many connections as the system allows it: the usual limit is 1024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def served_names(options: ServerOptions, engine_options: EngineOptions) -> list[str]:
    """Names of the model in requests."""
    if options.served_model_name:
        return list(options.served_model_name)
    if engine_options.model is None:
        return ["embedded"]
    return [engine_options.model.resolve().name]


def engine_maker(
    options: ServerOptions, engine_options: EngineOptions
) -> Callable[[Callable[[StartProgress], None]], Engine]:
    """What makes the engine in its thread, telling how far it is."""

    def make(tell: Callable[[StartProgress], None]) -> Engine:
        begun = time.monotonic()
        tell(StartProgress("loading"))
        changes = {}
        if options.chat_template is not None:
            tokenizer = Tokenizer.from_path(engine_options.folder)
            if tokenizer is None:
                raise ValueError(f"--chat-template={options.chat_template}: the model has no tokenizer")
            changes["tokenizer"] = tokenizer.with_chat_template(options.chat_template)
        engine = dataclasses.replace(engine_options, warmup=False).open(**changes)
        try:
            if not options.no_warmup:
                engine.warm_up(
                    lambda done, total: tell(
                        StartProgress("compiling", done, total, time.monotonic() - begun)
                    )
                )
            if options.attention_probe:
                engine.measure_attention()  # compiles its program, which would stop requests later
        except BaseException:
            engine.close()
            raise
        return engine

    return make


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; tells at once when it cannot.

    Raises:
      ValueError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)  # whoever connects from now on waits, and is not refused
    except OSError as error:
        sock.close()
        raise ValueError(f"--host={host} --port={port}: cannot be listened at: {error.strerror}") from None
    return sock


class Server(uvicorn.Server):
    """uvicorn, which on the first signal drains before it stops listening.

    While it drains, ``/health`` and new requests are answered with 503, so that whoever balances load goes elsewhere,
    and what is under way goes on for ``drain_timeout`` seconds, or until a second signal; then it is aborted, which
    its clients are told. ``owns_process``: nothing else lives in this process, so that what there is when the engine is
    ready may stay out of the garbage collector's sight.
    """

    def __init__(
        self, application: Application, options: ServerOptions, *, owns_process: bool = False
    ) -> None:
        limits = ConnectionLimits(
            header_timeout=options.header_timeout,
            send_timeout=options.send_timeout,
            max_connections=options.max_connections,
        )
        config = uvicorn.Config(
            application.asgi,
            http=limited_protocol(limits),
            ws="none",
            loop="uvloop",
            lifespan="on",
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_TIMEOUT,
            timeout_graceful_shutdown=CLOSE_TIMEOUT,
        )
        super().__init__(config)
        self.failure: Exception | None = None
        self._owns_process = owns_process
        self._engine = application.service.engine
        self._drain_timeout = options.drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._num_signals = 0
        self._last_signal = -SAME_SIGNAL_SECONDS

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and to watch the engine's start."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._tasks.append(asyncio.create_task(self._wait_for_engine()))

    async def _wait_for_engine(self) -> None:
        try:
            await self._engine.wait_ready()
        except EngineUnavailableError as error:
            if self._engine.state is EngineState.DEAD:
                cause = error.__cause__
                self.failure = cause if isinstance(cause, Exception) else error
            self.should_exit = True
        else:
            if self._owns_process:
                # What lives as long as the process need not be looked through again and again.
                gc.collect()
                gc.freeze()
            stderr().print(
                f"ready after {self._engine.progress.seconds:.1f} s", markup=False, highlight=False
            )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, the second aborts what is left, the third ends at once."""
        now = time.monotonic()
        if now - self._last_signal < SAME_SIGNAL_SECONDS:
            return
        self._last_signal = now
        self._num_signals += 1
        if self._loop is None or self._num_signals > 2:
            self.should_exit = self.force_exit = True
        elif self._num_signals == 2:
            self._loop.call_soon_threadsafe(self._engine.abort_all)
        else:
            logger.warning("%s: finishing what is under way", signal.Signals(sig).name)
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._tasks.append(asyncio.create_task(self._drain()))

    async def _drain(self) -> None:
        begun, count = time.monotonic(), self._engine.num_unfinished
        await self._engine.drain(self._drain_timeout)
        logger.warning("drained %d sequences in %.1f s", count, time.monotonic() - begun)
        self.should_exit = True

"""The application: routes over one engine, behind their guards, and what is told of every request."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp

from jaxpaged import __version__
from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.engine_errors import EngineUnavailableError
from jaxpaged.serve.engine_thread import EngineState
from jaxpaged.serve.metrics.access_log import AccessEntry, AccessLog
from jaxpaged.serve.metrics.prometheus import PrometheusMetrics
from jaxpaged.serve.metrics.tensorboard import TensorBoardWriter
from jaxpaged.serve.page.block_feed import BlockFeed
from jaxpaged.serve.page.routes import page_routes
from jaxpaged.serve.server.chat_completions import chat_routes
from jaxpaged.serve.server.completions import completion_routes
from jaxpaged.serve.server.event_stream import with_short_way
from jaxpaged.serve.server.failures import contain_failures, install_failure_handlers
from jaxpaged.serve.server.guard_options import guard_options, without_access_checks
from jaxpaged.serve.server.guards.access import RequestSummary
from jaxpaged.serve.server.guards.stack import GuardOptions, guard
from jaxpaged.serve.server.options import ServerOptions
from jaxpaged.serve.server.route_docs import COMMON_RESPONSES
from jaxpaged.serve.server.service import Service
from jaxpaged.serve.server.state_routes import state_routes
from jaxpaged.serve.server.text_routes import text_routes

logger = logging.getLogger(__name__)

_ENTRY_FIELDS = frozenset(field.name for field in fields(AccessEntry))


@dataclass(frozen=True)
class Application:
    """What serves: ``asgi`` for a server such as uvicorn; ``app`` inside it has the routes and the schema."""

    asgi: ASGIApp
    app: FastAPI
    service: Service
    metrics: PrometheusMetrics


def build_app(
    engine: AsyncEngine, options: ServerOptions, names: Sequence[str], *, behind_ingress: bool = False
) -> Application:
    """The application that serves ``engine`` under ``names``.

    ``behind_ingress``: keys, hosts and origins have been checked, by ``guard_options`` of the same options, before
    a request comes here.

    Raises:
      ValueError: an option makes no sense.
    """
    service = Service(engine, options, names)
    metrics = PrometheusMetrics(names[0])
    engine.add_listener(metrics)
    log = AccessLog.of_option(options.access_log)
    app = FastAPI(
        title="jaxpaged",
        version=__version__,
        summary="OpenAI-compatible serving of language models in JAX.",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        responses=COMMON_RESPONSES,
        lifespan=lambda _: _watch(engine, options, metrics, log),
    )
    install_failure_handlers(app, metrics.refused)
    app.include_router(completion_routes(service))
    app.include_router(chat_routes(service))
    app.include_router(text_routes(service))
    app.include_router(state_routes(service, metrics))
    if options.page:
        app.include_router(page_routes(BlockFeed(engine)))

    def on_end(summary: RequestSummary) -> None:
        metrics.http(summary.route, summary.method, summary.status, summary.seconds)
        if summary.disconnected:
            metrics.disconnected()
        log.write(_entry(summary))

    guards = guard_options(options)
    app.openapi = lambda: _schema(app, guards)  # type: ignore[method-assign]
    here = without_access_checks(guards) if behind_ingress else guards
    guarded = guard(contain_failures(app), here, on_end=on_end)
    return Application(with_short_way(guarded), app, service, metrics)


def _entry(summary: RequestSummary) -> AccessEntry:
    details: dict[str, Any] = {k: v for k, v in summary.details.items() if k in _ENTRY_FIELDS}
    if summary.disconnected:
        details.setdefault("error", "client_disconnected")
    return AccessEntry(
        request_id=summary.request_id or "",
        client=summary.client,
        method=summary.method,
        route=summary.route,
        status=summary.status,
        duration=summary.seconds,
        **details,
    )


def _schema(app: FastAPI, guards: GuardOptions) -> dict[str, Any]:
    """The OpenAPI schema: a body that does not fit is answered with 400, as OpenAI does, not FastAPI's 422.

    It says which routes need a key, where there are keys.
    """
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
        if guards.api_keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if guards.api_keys and path not in guards.public_paths:
                    operation["security"] = [{"key": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema


@contextlib.asynccontextmanager
async def _watch(
    engine: AsyncEngine, options: ServerOptions, metrics: PrometheusMetrics, log: AccessLog
) -> AsyncIterator[None]:
    """While the server runs: introduces the engine to the metrics, writes for TensorBoard, times attention."""
    board = None
    if options.tensorboard is not None:
        board = TensorBoardWriter(options.tensorboard, stats=lambda: engine.stats_from_thread(timeout=5.0))
        engine.add_listener(board)
    task = asyncio.create_task(_observe(engine, options, metrics, board))
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if board is not None:
            board.close()
        log.close()


async def _observe(
    engine: AsyncEngine, options: ServerOptions, metrics: PrometheusMetrics, board: TensorBoardWriter | None
) -> None:
    try:
        await engine.wait_ready()
        metrics.set_engine(engine.config, await engine.run(lambda live: live.memory_report()))
        while options.attention_probe and engine.state is EngineState.READY:
            await asyncio.sleep(options.attention_probe)
            seconds = await engine.run(lambda live: live.measure_attention())
            if seconds is not None:
                metrics.observe_attention(seconds)
                if board is not None:
                    board.observe_attention(seconds)
    except EngineUnavailableError:
        logger.debug("the engine ended before its observer")
    except Exception:
        logger.exception("the engine is observed no more")

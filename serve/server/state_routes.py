"""``/health``, ``/version`` and ``/metrics``."""

import dataclasses
from importlib import metadata

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from jaxpaged import EngineStats, __version__
from jaxpaged.serve.engine_errors import EngineUnavailableError
from jaxpaged.serve.engine_thread import EngineState
from jaxpaged.serve.metrics.prometheus import PrometheusMetrics
from jaxpaged.serve.server.responses import HealthResponse, Progress, VersionResponse
from jaxpaged.serve.server.service import Service


def state_routes(service: Service, metrics: PrometheusMetrics) -> APIRouter:
    """The routes."""
    router = APIRouter()
    engine = service.engine

    @router.get(
        "/health",
        response_model=HealthResponse,
        responses={503: {"model": HealthResponse, "description": "Not ready, and why."}},
    )
    async def health() -> Response:
        """Whether requests are taken: 200 if so, else 503 with how far the start has come, or what is wrong."""
        state, progress = engine.state, None
        if state is EngineState.STARTING:
            progress = Progress(**dataclasses.asdict(engine.progress))
        error = None if engine.error is None else f"{type(engine.error).__name__}"
        body = HealthResponse(status=state.value, progress=progress, error=error)
        ready = state is EngineState.READY
        headers = {"Cache-Control": "no-store"} | ({} if ready else {"Retry-After": "5"})
        return JSONResponse(body.model_dump(exclude_none=True), 200 if ready else 503, headers)

    @router.get("/version")
    async def version() -> VersionResponse:
        """Versions of this package and of jax."""
        return VersionResponse(version=__version__, jax=metadata.version("jax"))

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus(request: Request) -> Response:
        """All metrics, in the format of Prometheus."""
        metrics.set_state(engine.state.value)
        try:
            stats = await engine.stats()
        except EngineUnavailableError:
            stats = EngineStats()  # what is known of HTTP is told in any state
        body, media_type = metrics.render(stats, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": media_type})

    return router

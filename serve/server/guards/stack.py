"""All guards around an application, in the order that they need."""

from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp

from jaxpaged.serve.server.guards.access import Access, RequestSummary
from jaxpaged.serve.server.guards.api_key import PUBLIC_PATHS, ApiKey
from jaxpaged.serve.server.guards.body_limit import (
    BODY_TIMEOUT,
    MAX_BODY_BYTES,
    MAX_TOTAL_BODY_BYTES,
    BodyLimit,
)
from jaxpaged.serve.server.guards.cors import Cors
from jaxpaged.serve.server.guards.host_check import HostCheck, hosts_to_allow
from jaxpaged.serve.server.guards.request_id import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardOptions:
    """What the guards are given; see each of them."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)  # none: everybody is let in
    public_paths: tuple[str, ...] = PUBLIC_PATHS
    bind_host: str | None = "127.0.0.1"  # None: a Unix socket
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    max_total_body_bytes: int = MAX_TOTAL_BODY_BYTES
    body_timeout: float = BODY_TIMEOUT


def guard(
    app: ASGIApp, options: GuardOptions, *, on_end: Callable[[RequestSummary], None] | None = None
) -> ASGIApp:
    """``app`` behind its guards, for ``uvicorn.Config``; raises ValueError for an option that makes no sense.

    From the inside: bodies are read only of those who have a key; a page of an allowed origin can read why it was
    refused; whatever is answered, errors of the application included, has a request id and is told to ``on_end``.
    That is why this goes around a FastAPI application rather than into its ``add_middleware``, around which
    Starlette puts the handler that answers 500.
    """
    guarded: ASGIApp = BodyLimit(
        app,
        max_body_bytes=options.max_body_bytes,
        max_total_body_bytes=options.max_total_body_bytes,
        body_timeout=options.body_timeout,
    )
    if options.api_keys:
        guarded = ApiKey(guarded, options.api_keys, public_paths=options.public_paths)
    if options.allowed_origins:
        guarded = Cors(guarded, options.allowed_origins)
    hosts = hosts_to_allow(options.bind_host, options.allowed_hosts)
    if hosts is not None:
        guarded = HostCheck(guarded, hosts)
    guarded = RequestId(guarded)
    return guarded if on_end is None else Access(guarded, on_end)

"""What an engine that serves is doing, and how far its start has come."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

from jaxpaged import Engine


class EngineState(enum.StrEnum):
    """What an engine that serves is doing."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"
    CLOSED = "closed"


@dataclass(frozen=True)
class StartProgress:
    """How far the start has come: ``done`` of ``total`` parts of a stage, ``seconds`` since the beginning."""

    stage: str  # "loading", "compiling" or "ready"
    done: int = 0
    total: int = 0
    seconds: float = 0.0


class StartCancelledError(RuntimeError):
    """The engine was closed before it had started."""


MakeEngine = Callable[[Callable[[StartProgress], None]], Engine]

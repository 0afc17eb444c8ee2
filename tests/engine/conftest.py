"""Engines that tests share, so that their programs are compiled once in a process."""

from collections.abc import Iterator
from typing import Any

import jax
import pytest

from jaxpaged import Engine
from tests.engine.family import FULL, sibling, unburdened
from tests.engine.tiny import idle, shared_engine


@pytest.fixture
def engine() -> Iterator[Engine]:
    with idle(shared_engine()) as found:
        yield found


@pytest.fixture(scope="module", params=[False, True], ids=["in step", "ahead"])
def either_for_all(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with sibling(async_scheduling=request.param, **FULL) as engine:
        yield engine


@pytest.fixture
def either(either_for_all: Engine) -> Iterator[Engine]:
    """An engine that runs one step at a time, and one that runs ahead."""
    with unburdened(either_for_all) as engine:
        yield engine


@pytest.fixture(scope="module", params=[1, 8], ids=["one step a program", "eight"])
def ahead_for_all(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with sibling(async_scheduling=True, num_scheduler_steps=request.param, **FULL) as engine:
        yield engine


@pytest.fixture
def ahead(ahead_for_all: Engine) -> Iterator[Engine]:
    """An engine that runs one step ahead, with one decode step a program and with several."""
    with unburdened(ahead_for_all) as engine:
        yield engine


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Every compilation and trace that jax reports while the test runs."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if "compile" in event or "trace" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)

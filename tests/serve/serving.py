"""An engine that serves event loops, for tests, and what they do with its streams."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

from jaxpaged import Engine
from jaxpaged.serve.async_engine import AsyncEngine, OutputStream
from jaxpaged.serve.engine_state import EngineState
from tests.serve.asynchronous import TIMEOUT, until
from tests.serve.served_engines import assert_clean, check, tiny


@contextlib.asynccontextmanager
async def serving(*, max_queue_length: int = 1024, **switches: Any) -> AsyncIterator[AsyncEngine]:
    """An engine that serves, and the check that it is left with nothing."""
    async with AsyncEngine(tiny(**switches), max_queue_length=max_queue_length) as engine:
        yield engine
        if engine.state is EngineState.READY:
            await assert_idle(engine)


async def assert_idle(engine: AsyncEngine) -> None:
    await until(lambda: not engine.num_unfinished)
    assert_clean(await engine.run(check))


async def tokens_of(stream: OutputStream) -> list[int]:
    return [token async for output in stream for token in output.outputs[0].token_ids]


@contextlib.asynccontextmanager
async def standing(engine: AsyncEngine) -> AsyncIterator[None]:
    """The engine's thread stands between two steps meanwhile."""
    stands, goes_on = threading.Event(), threading.Event()

    def stand(_: Engine) -> None:
        stands.set()
        assert goes_on.wait(TIMEOUT), "nobody let go"

    task = asyncio.create_task(engine.run(stand))
    await until(stands.is_set)
    try:
        yield
    finally:
        goes_on.set()
    await task

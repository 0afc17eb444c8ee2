"""Tests that are coroutines, and waiting for what other threads bring about; nothing waits for ever."""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any

# Seconds: far more than anything here takes, on the busiest of machines.
TIMEOUT = 120.0


def asynchronous(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs a test that is a coroutine function in an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(TIMEOUT):
                await test(*arguments, **named)

        asyncio.run(limited())

    return run


def wait_until(condition: Callable[[], object]) -> None:
    """Waits in a thread until something holds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.002)


async def until(condition: Callable[[], object]) -> None:
    """The same in an event loop."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        await asyncio.sleep(0.002)

"""Sends requests at their times and waits for the ends of all of them."""

import asyncio
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxpaged.serve.bench_serve.client import Client, Failure
from jaxpaged.serve.bench_serve.connection import Exchange


@dataclass(frozen=True, slots=True)
class Attempt:
    """A request that has come to an end; times of ``time.perf_counter``."""

    at: int
    scheduled: float
    exchange: Exchange
    failure: Failure | None


@dataclass
class LoadRun:
    """When requests were sent and answered, by ``time.perf_counter``, and what that cost this process."""

    started: float
    ended: float
    cpu_seconds: float = 0.0
    num_connections: int = 0
    num_unfinished: int = 0

    @property
    def seconds(self) -> float:
        """From the first request to the end of the last."""
        return self.ended - self.started


async def run_load(
    client: Client,
    messages: Sequence[bytes],
    schedule: Sequence[float],
    take: Callable[[Attempt], None],
    *,
    max_concurrency: int | None = None,
    tick: Callable[[], None] | None = None,
) -> LoadRun:
    """Sends each message at its time, in seconds from now, whether or not those before have been answered.

    With ``max_concurrency`` a request waits in the client while so many are in flight. ``take`` gets each as it ends,
    and ``tick`` is called twice a second. Being cancelled ends what is in flight, of which nothing is taken.
    """
    gate = asyncio.Semaphore(max_concurrency or len(messages) or 1)
    with _undisturbed():
        cpu, now = time.thread_time(), time.perf_counter()
        run = LoadRun(now, now, num_unfinished=len(messages))

        async def send(at: int) -> None:
            exchange, failure = await client.send(messages[at])
            gate.release()
            run.num_unfinished -= 1
            run.ended = max(run.ended, exchange.ended)
            take(Attempt(at, run.started + schedule[at], exchange, failure))

        ticker = asyncio.create_task(_tick(tick)) if tick is not None else None
        try:
            async with asyncio.TaskGroup() as group:
                for at in range(len(messages)):
                    # More than once, as an event loop may wake up a little too early.
                    while (delay := run.started + schedule[at] - time.perf_counter()) > 0:
                        await asyncio.sleep(delay)
                    await gate.acquire()
                    group.create_task(send(at))
        except asyncio.CancelledError:
            _take_back_cancellation()
        finally:
            if ticker is not None:
                ticker.cancel()
        run.cpu_seconds = time.thread_time() - cpu
    run.num_connections = client.num_connections
    return run


def _take_back_cancellation() -> None:
    """Lets the task that was cancelled by Ctrl-C go on, to tell what it has."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


async def _tick(tick: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(0.5)
        tick()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection meanwhile: a pause would be seen as a latency of the server."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop of uvloop where that is installed, else asyncio's own."""
    if sys.platform != "win32":
        try:
            import uvloop
        except ImportError:
            pass
        else:
            return uvloop.new_event_loop()
    return asyncio.new_event_loop()

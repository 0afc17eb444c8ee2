"""The live picture of the engine for everybody who looks at the page: one sampler, small events, little work.

While somebody watches, and something happens, the engine is looked at up to eight times a second, between two of its
steps. What that costs, in the engine's thread and in the event loop, is measured; the pause that follows is as long as
it takes for the cost to stay below a share of one core, so a larger pool or more viewers mean fewer pictures. While
nobody watches a step costs a microsecond and nothing else is done.
"""

import asyncio
import logging
import time
from dataclasses import replace
from typing import Self

import msgspec

from jaxpaged import Engine
from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.engine_errors import EngineUnavailableError
from jaxpaged.serve.engine_thread import EngineState
from jaxpaged.serve.page.changes import Change, changes
from jaxpaged.serve.page.snapshot import Observer, Snapshot

logger = logging.getLogger(__name__)

MIN_INTERVAL = 0.125  # seconds between two pictures at least
IDLE_INTERVAL = 2.0  # and at most, in case something changed without a step
KEEP_ALIVE_SECONDS = 15.0
# Of the share that may be used this much is planned for: waking up and sending are known only roughly.
PLANNED = 0.75
# CPU seconds of what cannot be measured from here: a call into the engine's thread and back; waking a viewer.
CALL_SECONDS, WAKE_SECONDS = 3e-4, 5e-5
# Sending an event to a viewer counts as no more than this: other work may have gone on meanwhile.
MAX_SEND_SECONDS = 5e-4
KEEP_ALIVE = b": keep-alive\n\n"


class TooManyViewersError(RuntimeError):
    """As many watch already as may."""


class BlockFeed:
    """Events about the blocks, requests and steps of an engine, for any number of viewers up to a limit.

    A viewer that reads slowly gets fewer events, each with all that has changed since its last one, and holds up
    nobody: what waits for it is one snapshot. Belongs to one event loop.

    Args:
      engine: what to watch; may still be starting.
      max_viewers: that may watch at the same time.
      max_share: of one core that all of this may take, on average.
      min_interval: seconds between two events of a viewer at least.
      keep_alive: seconds after which a viewer without an event gets a comment.

    Attributes:
      num_viewers: that watch now.
      num_samples: snapshots taken so far.
      seconds_spent: CPU seconds it took so far, in both threads, as far as it is measured.
      interval: seconds until the next snapshot at least, after the last one.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        max_viewers: int = 16,
        max_share: float = 0.01,
        min_interval: float = MIN_INTERVAL,
        keep_alive: float = KEEP_ALIVE_SECONDS,
    ) -> None:
        self._engine = engine
        self.max_viewers = max_viewers
        self.max_share = max_share
        self.min_interval = min_interval
        self.keep_alive = keep_alive
        self.num_viewers = self.num_samples = 0
        self.seconds_spent = 0.0
        self.interval = min_interval
        self._observer = Observer()
        engine.add_listener(self._observer)
        self._latest: Snapshot | None = None
        self._encoded: dict[int, bytes] = {}  # the event that leads to it, by what a viewer has seen
        self._looked = 0.0  # when the engine was last looked at, and what it had to do then
        self._num_unfinished = 0
        self._debt = 0.0  # CPU seconds spent since the last pause was planned
        self._num_waiting = 0  # viewers that have seen the latest
        self._is_wanted = asyncio.Event()
        self._fresh: asyncio.Future[None] | None = None  # done when there is a newer one
        self._sampler: asyncio.Task[None] | None = None
        self._ended = False

    def watch(self) -> "Viewer":
        """A new viewer, which has to be closed.

        Raises:
          TooManyViewersError: ``max_viewers`` watch already.
        """
        if self.num_viewers >= self.max_viewers:
            raise TooManyViewersError(f"{self.max_viewers} watch already")
        self.num_viewers += 1
        if self._sampler is None:
            self._sampler = asyncio.get_running_loop().create_task(self._sample())
        return Viewer(self)

    def close(self) -> None:
        """Ends the streams of all viewers, now and from now on: for a server that shuts down."""
        self._ended = True
        self._wake_viewers()

    def leave(self) -> None:
        """A viewer is gone; after the last one nothing is done any more."""
        self.num_viewers -= 1
        if self.num_viewers == 0 and self._sampler is not None:
            self._sampler.cancel()
            self._sampler, self._latest = None, None
            self._encoded.clear()
            self._observer.forget()

    async def newer(self, seen: Snapshot | None) -> Snapshot | None:
        """The latest snapshot once it is another than ``seen``; None when there is none for a while.

        Raises:
          StopAsyncIteration: there will be none.
        """
        while self._latest is None or self._latest is seen:
            if self._ended:
                raise StopAsyncIteration
            if self._fresh is None:
                self._fresh = asyncio.get_running_loop().create_future()
            self._num_waiting += 1
            self._is_wanted.set()
            try:
                done, _ = await asyncio.wait([self._fresh], timeout=self.keep_alive)
            finally:
                self._num_waiting -= 1
                if not self._num_waiting:
                    self._is_wanted.clear()
            if not done:
                return None
            self.spend(WAKE_SECONDS)
        return self._latest

    def event(self, seen: Snapshot | None, latest: Snapshot) -> bytes:
        """What tells a viewer that has seen ``seen`` of ``latest``; viewers that are up to date share it."""
        key = 0 if seen is None else seen.number
        found = self._encoded.get(key) if latest is self._latest else None
        if found is None:
            begun = time.thread_time()
            found = self._encode(changes(seen, latest))
            if latest is self._latest:
                self._encoded[key] = found
            self.spend(time.thread_time() - begun)
        return found

    def spend(self, seconds: float) -> None:
        """Notes CPU time, for which the next pause will make up."""
        self._debt += seconds
        self.seconds_spent += seconds

    def _encode(self, change: Change) -> bytes:
        about = {"interval": round(self.interval, 3), "max_share": self.max_share}
        return b"data: " + msgspec.json.encode(change | {"feed": about}) + b"\n\n"

    async def _sample(self) -> None:
        """Runs while somebody watches."""
        while not self._ended:
            await self._is_wanted.wait()
            try:
                if self._is_due():
                    await self._look()
            except Exception:
                logger.exception("the block feed could not look at the engine")
            await asyncio.sleep(self._pause())

    def _is_due(self) -> bool:
        """Whether anything may have happened since the last look."""
        latest, engine = self._latest, self._engine
        return (
            latest is None
            or self._observer.num_steps != latest.num_steps
            or engine.num_unfinished != self._num_unfinished
            or latest.status != self._status()
            or time.monotonic() - self._looked >= IDLE_INTERVAL
        )

    def _pause(self) -> float:
        """Seconds until the next look."""
        self.interval = max(self.min_interval, self._debt / (PLANNED * self.max_share))
        self._debt = 0.0
        return self.interval

    async def _look(self) -> None:
        self._looked, self._num_unfinished = time.monotonic(), self._engine.num_unfinished
        ends = self._engine.state is EngineState.CLOSED or (
            self._engine.state is EngineState.DRAINING and self._num_unfinished == 0
        )
        snapshot = await self._take()
        begun = time.thread_time()
        change = changes(self._latest, snapshot)
        if change:
            key = 0 if self._latest is None else self._latest.number
            self._latest, self._encoded = snapshot, {key: self._encode(change)}
        self.spend(time.thread_time() - begun)
        self._ended = self._ended or ends
        if change or self._ended:
            self._wake_viewers()

    async def _take(self) -> Snapshot:
        """The engine as it is; while there is nothing to look at in it, what it does."""
        status = self._status()
        observer = self._observer

        def measured(engine: Engine) -> tuple[Snapshot, float]:
            begun = time.thread_time()
            return observer.take(engine, status), time.thread_time() - begun

        self.num_samples += 1
        try:
            snapshot, seconds = await self._engine.run(measured)
        except EngineUnavailableError:
            before = Snapshot() if self._latest is None else self._latest
            return replace(
                before, number=observer.next_number(), time=time.monotonic(), status=self._status()
            )
        self.spend(seconds + CALL_SECONDS)
        return snapshot

    def _status(self) -> dict[str, object]:
        state = self._engine.state
        if state is not EngineState.STARTING:
            return {"state": state.value}
        progress = self._engine.progress
        return {
            "state": state.value,
            "progress": {"stage": progress.stage, "done": progress.done, "total": progress.total},
        }

    def _wake_viewers(self) -> None:
        if self._fresh is not None:
            self._fresh.set_result(None)
            self._fresh = None


class Viewer:
    """The events of one viewer, as they go over the wire: ``async for chunk in viewer``, then ``close``."""

    def __init__(self, feed: BlockFeed) -> None:
        self._feed = feed
        self._seen: Snapshot | None = None
        self._is_open = True
        self._handed_over: float | None = None  # thread time when the last event was

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._handed_over is not None:
            self._feed.spend(min(time.thread_time() - self._handed_over, MAX_SEND_SECONDS))
            self._handed_over = None
        snapshot = await self._feed.newer(self._seen)
        if snapshot is None:
            return KEEP_ALIVE
        chunk = self._feed.event(self._seen, snapshot)
        self._seen = snapshot
        self._handed_over = time.thread_time()
        return chunk

    def close(self) -> None:
        """Watches no more; closing twice is fine."""
        if self._is_open:
            self._is_open = False
            self._seen = None
            self._feed.leave()

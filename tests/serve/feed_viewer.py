"""What a page makes of the events of the block feed, and an engine without work behind it that they tell of."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from jaxpaged import Engine
from jaxpaged.records import IterationRecord
from jaxpaged.serve.engine_errors import EngineDeadError
from jaxpaged.serve.engine_thread import EngineState, StartProgress
from jaxpaged.serve.page.block_feed import BlockFeed
from jaxpaged.serve.page.changes import STEP_FIELDS
from jaxpaged.serve.page.snapshot import MAX_STEPS, Snapshot

DEADLINE = 30.0
FAST: dict[str, Any] = {"max_share": 1.0, "min_interval": 0.001}


class Viewed:
    """Applies events, by what their description says and nothing else."""

    def __init__(self) -> None:
        self.num_events = 0
        self.num_bytes = 0
        self.time = 0.0
        self.sizes: dict[str, int] = {}
        self.status: dict[str, Any] = {}
        self.blocks = bytearray()
        self.requests: dict[int, dict[str, Any]] = {}
        self.steps: list[list[float]] = []
        self.seconds: dict[int, list[int]] = {}
        self.counters: dict[str, float] = {}

    def feed(self, chunk: bytes) -> None:
        """Takes what came over the wire; comments are nothing."""
        self.num_bytes += len(chunk)
        assert chunk.endswith(b"\n\n")
        if chunk.startswith(b":"):
            return
        assert chunk.startswith(b"data: ")
        assert chunk.count(b"\n") == 2
        self.num_events += 1
        self.apply(json.loads(chunk.removeprefix(b"data: ")))

    def apply(self, event: dict[str, Any]) -> None:
        if event.get("full"):
            self.sizes, self.requests, self.seconds, self.counters = event["sizes"], {}, {}, {}
            self.steps, self.status = [], {}
            self.blocks = bytearray(self.sizes.get("num_blocks", 0))
        self.time = event.get("time", self.time)
        self.status = event.get("status", self.status)
        place = 0
        runs = event.get("blocks", [])
        for at in range(0, len(runs), 3):
            gap, length, state = runs[at : at + 3]
            place += gap
            assert place + length <= len(self.blocks)
            self.blocks[place : place + length] = bytes([state]) * length
            place += length
        self._apply_requests(event)
        for step in event.get("steps", []):
            assert len(step) == len(STEP_FIELDS)
            assert not self.steps or step[0] > self.steps[-1][0]
        self.steps = [*self.steps, *event.get("steps", [])][-MAX_STEPS:]
        self.seconds |= {second[0]: second[1:] for second in event.get("seconds", [])}
        self.counters |= event.get("counters", {})

    def _apply_requests(self, event: dict[str, Any]) -> None:
        for number in event.get("ended", []):
            del self.requests[number]
        for number, name, index, num_prompt_tokens in event.get("arrived", []):
            assert number not in self.requests
            about = {"id": name, "index": index, "prompt": num_prompt_tokens}
            self.requests[number] = about | {"progress": None, "tables": {}}
        for number, *progress in event.get("progress", []):
            self.requests[number]["progress"] = progress
        for number, group, same, *runs in event.get("tables", []):
            ids = self.requests[number]["tables"].get(group, [])[:same]
            assert len(ids) == same
            for first, length in zip(runs[::2], runs[1::2], strict=True):
                ids += [0] * length if first == 0 else range(first, first + length)
            self.requests[number]["tables"][group] = ids

    def check(self, snapshot: Snapshot) -> None:
        """Asserts that this is what the snapshot is."""
        assert self.sizes == dict(snapshot.sizes)
        assert self.status == dict(snapshot.status)
        assert bytes(self.blocks) == snapshot.block_states
        assert self.requests.keys() == snapshot.requests.keys()
        for number, view in snapshot.requests.items():
            seen = self.requests[number]
            assert (seen["id"], seen["index"]) == (view.request_id, view.index)
            assert seen["prompt"] == view.num_prompt_tokens
            assert seen["progress"] == list(view.progress)
            tables = {group: ids for group, ids in enumerate(view.tables) if ids}
            assert {group: ids for group, ids in seen["tables"].items() if ids} == tables
        assert [step[0] for step in self.steps] == [record.step for record in snapshot.steps]
        last = snapshot.seconds[0].second if snapshot.seconds else 0
        kept = [[s, *rest] for s, rest in sorted(self.seconds.items()) if s >= last]
        assert kept == [list(second) for second in snapshot.seconds]
        assert self.counters == dict(snapshot.counters)


async def next_chunk(stream: AsyncIterator[bytes]) -> bytes:
    """The next piece of a stream; fails the test if none comes."""
    return await asyncio.wait_for(anext(stream), DEADLINE)


def run(main: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(main(), 2 * DEADLINE))


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.002)


class FakeEngine:
    """As much of an AsyncEngine as the feed uses, and no work behind it."""

    def __init__(self, engine: Engine | None = None) -> None:
        self.state = EngineState.READY
        self.progress = StartProgress("compiling", 2, 7)
        self.num_unfinished = 0
        self.num_calls = 0
        self.engine = engine
        self.listener: Any = None
        self.delay = 0.0

    def add_listener(self, listener: Any) -> None:
        self.listener = listener

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            number = self.listener.num_steps + 1
            self.listener.stepped(IterationRecord(number, time.monotonic(), num_generation_tokens=1))

    async def run(self, function: Callable[[Any], Any]) -> Any:
        self.num_calls += 1
        if self.state not in (EngineState.READY, EngineState.DRAINING):
            raise EngineDeadError("gone")
        if self.delay:
            burn(self.delay)
        return function(self)

    def block_states(self) -> bytes:
        return bytes([6, *[2] * 9])

    def live_requests(self) -> list[Any]:
        return []


def burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    monkeypatch.setattr("jaxpaged.serve.page.snapshot._sizes", lambda _, count: {"num_blocks": count})
    monkeypatch.setattr("jaxpaged.serve.page.snapshot._counters", lambda _: {})
    return FakeEngine()


def feed_of(fake: FakeEngine, **arguments: Any) -> BlockFeed:
    engine: Any = fake
    return BlockFeed(engine, **{**FAST, **arguments})

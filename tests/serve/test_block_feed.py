"""The block feed: events add up to the state, cost little, and nobody waits for a slow viewer."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged import RequestOutputKind, SamplingParams
from jaxpaged.records import IterationRecord
from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.engine_thread import EngineState, StartProgress
from jaxpaged.serve.page import block_feed
from jaxpaged.serve.page.block_feed import KEEP_ALIVE, BlockFeed, TooManyViewersError, Viewer
from jaxpaged.serve.page.changes import _many_block_runs, block_runs, changes, id_runs, table_change
from jaxpaged.serve.page.snapshot import MAX_SECONDS, MAX_STEPS, Observer, RequestView, Second, Snapshot
from tests.engine.tiny import GREEDY, new_engine, prompt_of
from tests.serve.feed_viewer import FAST, FakeEngine, Viewed, burn, fake, feed_of, next_chunk, run

__all__ = ["fake"]

# What changed between two snapshots.

blocks = st.integers(2, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 6), min_size=n, max_size=n).map(bytes)] * 2)
)
ids = st.lists(st.integers(0, 12), max_size=12)


@given(blocks)
def test_runs_of_blocks_lead_from_one_state_to_the_other(pair: tuple[bytes, bytes]) -> None:
    before, after = pair
    runs = block_runs(before, after)
    viewed = Viewed()
    viewed.blocks = bytearray(before)
    viewed.apply({"blocks": runs})
    assert bytes(viewed.blocks) == after
    assert all(length > 0 for length in runs[1::3])
    changed = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
    assert sum(runs[1::3]) == changed.size
    if changed.size:
        assert _many_block_runs(changed, np.frombuffer(after, np.uint8)) == runs


@given(ids, ids)
def test_a_table_changes_from_where_it_differs(before: list[int], after: list[int]) -> None:
    change = table_change(before, after)
    if before == after:
        assert change is None
        return
    assert change is not None
    viewed = Viewed()
    viewed.requests[1] = {"tables": {0: before}}
    viewed.apply({"tables": [[1, 0, *change]]})
    assert viewed.requests[1]["tables"][0] == after
    assert change[0] == next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )


def test_runs_of_ids_are_few() -> None:
    assert id_runs([]) == []
    assert id_runs([5, 6, 7, 3, 4, 9]) == [5, 3, 3, 2, 9, 1]
    assert id_runs([0, 0, 0, 1, 2]) == [0, 3, 1, 2]
    assert id_runs([7, 0, 8]) == [7, 1, 0, 1, 8, 1]


class World:
    """Snapshots of an engine that does anything at all."""

    def __init__(self, seed: int, num_blocks: int = 60) -> None:
        self.random = random.Random(seed)
        self.observer = Observer()
        self.snapshot = Snapshot(sizes={"num_blocks": num_blocks}, block_states=bytes(num_blocks))
        self.num_requests = 0

    def go_on(self) -> Snapshot:
        rng, old = self.random, self.snapshot
        states = bytearray(old.block_states)
        for _ in range(rng.choice((0, 1, 5, 40))):
            states[rng.randrange(len(states))] = rng.randrange(7)
        requests = {n: self._moved(v) for n, v in old.requests.items() if rng.random() < 0.9}
        for _ in range(rng.choice((0, 0, 1, 3))):
            self.num_requests += 1
            name = rng.choice(("plain", 'quo"te', "ünïcode\u2028", "<b>"))
            requests[self.num_requests] = RequestView(
                name, rng.randrange(3), rng.randrange(99), (0,) * 6, ([], self._ids())
            )
        for _ in range(rng.choice((0, 1, 3, 500))):
            record = IterationRecord(
                self.observer.num_steps + 1, old.time + rng.random(), num_generation_tokens=3
            )
            self.observer.stepped(record)
        self.snapshot = Snapshot(
            number=old.number + 1,
            time=old.time + 1,
            sizes=old.sizes,
            status={"state": rng.choice(("ready", "draining"))},
            block_states=bytes(states),
            requests=requests,
            steps=tuple(self.observer._steps),
            num_steps=self.observer.num_steps,
            seconds=tuple(self.observer._seconds),
            counters={"a": rng.randrange(3), "b": rng.random()},
        )
        return self.snapshot

    def _ids(self) -> list[int]:
        return [self.random.randrange(60) for _ in range(self.random.randrange(9))]

    def _moved(self, view: RequestView) -> RequestView:
        rng = self.random
        table = view.tables[1]
        grown = rng.choice((table, [*table, *self._ids()], table[:2], self._ids()))
        progress = rng.choice((view.progress, tuple(rng.randrange(9) for _ in range(6))))
        return RequestView(
            view.request_id, view.index, view.num_prompt_tokens, progress, (view.tables[0], grown)
        )


@given(st.integers(0, 10**6))
@settings(max_examples=60)
def test_events_add_up_to_the_state_whatever_is_skipped(seed: int) -> None:
    world, seen, viewed = World(seed), None, Viewed()
    for _ in range(25):
        snapshot = world.go_on()
        if world.random.random() < 0.4:
            continue  # the viewer was slow
        viewed.apply(changes(seen, snapshot))
        viewed.check(snapshot)
        assert changes(snapshot, snapshot) == {}
        seen = snapshot


def test_notes_of_steps_are_bounded() -> None:
    observer = Observer()
    for i in range(5000):
        observer.stepped(IterationRecord(i, i / 4, num_generation_tokens=2, num_live_blocks=i % 7))
    assert observer.num_steps == 5000
    assert len(observer._steps) == MAX_STEPS
    assert len(observer._seconds) == MAX_SECONDS
    assert observer._seconds[-1] == Second(1249, 8, 6)


# Over a real engine.


@asynccontextmanager
async def serving(**arguments: Any) -> AsyncIterator[AsyncEngine]:
    async with AsyncEngine(new_engine(**arguments)) as engine:
        yield engine


async def complete(engine: AsyncEngine, length: int, seed: int, params: SamplingParams, name: str) -> None:
    async for _ in engine.generate(prompt_of(length, seed), params, request_id=name):
        pass


def test_viewers_of_a_real_engine_see_all_of_it() -> None:
    """Prefix hits, forks, swapping, preemption and ends, watched by one from the start and one who comes late."""

    async def main() -> None:
        async with serving(num_host_blocks=16, preemption_mode="swap") as engine:
            feed = BlockFeed(engine, **FAST)
            viewers = {feed.watch(): Viewed()}
            states: set[int] = set()
            work = [
                complete(engine, 20, i % 3, GREEDY.clone(max_tokens=40, n=1 + i % 2), f"r{i}")
                for i in range(12)
            ]
            running = asyncio.gather(*work)
            while not running.done() or engine.num_unfinished:
                if len(viewers) < 2 and feed.num_samples > 5:
                    viewers[feed.watch()] = Viewed()
                for viewer, viewed in viewers.items():
                    viewed.feed(await next_chunk(viewer))
                    assert viewer._seen is not None
                    viewed.check(viewer._seen)
                    states |= {view["progress"][0] for view in viewed.requests.values()}
            await running
            for viewer, viewed in viewers.items():
                while viewed.requests or viewed.counters["num_generation_tokens"] < 12 * 40 + 6 * 40:
                    viewed.feed(await next_chunk(viewer))
                assert viewed.counters["num_running"] == 0
                assert set(viewed.blocks) <= {0, 1, 6}
                assert viewed.counters["prefix_cache_hits"] > 0
                assert viewed.num_events > 5
                viewer.close()
            assert {0, 1, 3} <= states
            assert feed.num_viewers == 0

    run(main)


def test_events_hold_no_text_and_no_tokens() -> None:
    async def main() -> None:
        async with serving() as engine:
            feed = BlockFeed(engine, **FAST)
            viewer, viewed, wire = feed.watch(), Viewed(), b""
            secret = "sesame-open-sesame"
            params = GREEDY.clone(max_tokens=12, output_kind=RequestOutputKind.FINAL_ONLY)
            stream = engine.generate(secret, params, request_id="named")
            answer = asyncio.ensure_future(anext(stream))
            while viewed.counters.get("num_generation_tokens", 0) < 12:
                wire += (chunk := await next_chunk(viewer))
                viewed.feed(chunk)
            viewer.close()
            assert b"named" in wire
            assert secret.encode() not in wire
            assert (await answer).outputs[0].text.encode() not in wire
            assert engine.tokenizer is not None
            ids = engine.tokenizer.encode(secret)[:3]
            assert ",".join(map(str, ids)).encode() not in wire

    run(main)


def test_nothing_is_done_while_nobody_watches_and_nothing_happens(fake: FakeEngine) -> None:
    async def main() -> None:
        feed = feed_of(fake, keep_alive=0.05)
        fake.step(10)
        await asyncio.sleep(0.05)
        assert fake.num_calls == 0
        viewer = feed.watch()
        assert (await next_chunk(viewer)).startswith(b"data: ")
        # An idle engine: comments, and no further look at it before IDLE_INTERVAL.
        assert await next_chunk(viewer) == KEEP_ALIVE
        assert fake.num_calls == 1
        fake.step()
        assert (await next_chunk(viewer)).startswith(b"data: ")
        viewer.close()
        fake.step()
        calls = fake.num_calls
        await asyncio.sleep(0.05)
        assert fake.num_calls == calls
        assert (feed._sampler, feed._latest, feed._encoded) == (None, None, {})

    run(main)


def test_what_changes_without_a_step_is_seen_all_the_same(
    fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(block_feed, "IDLE_INTERVAL", 0.02)
        feed = feed_of(fake)
        viewer, viewed = feed.watch(), Viewed()
        viewed.feed(await next_chunk(viewer))
        fake.block_states = lambda: bytes([6, *[1] * 9])  # type: ignore[method-assign]
        viewed.feed(await next_chunk(viewer))
        assert bytes(viewed.blocks) == fake.block_states()
        viewer.close()

    run(main)


@pytest.mark.parametrize("delay", [0.0005, 0.004])
def test_the_cost_stays_below_the_share(fake: FakeEngine, delay: float) -> None:
    """Whatever a look costs, the pauses make up for it."""

    async def main() -> None:
        fake.delay = 0.0
        feed = feed_of(fake, max_share=0.05, min_interval=0.001)
        slow = fake.block_states

        def costly() -> bytes:
            burn(delay)
            return slow()

        fake.block_states = costly  # type: ignore[method-assign]
        viewers = [feed.watch() for _ in range(3)]
        begun = time.monotonic()
        for _ in range(8):
            fake.step()
            for viewer in viewers:
                await next_chunk(viewer)
        planned = time.monotonic() - begun + feed.interval  # the pause that has begun belongs to it
        assert feed.seconds_spent >= 8 * delay
        assert feed.seconds_spent / planned <= 0.05
        for viewer in viewers:
            viewer.close()

    run(main)


def test_a_slow_viewer_gets_the_latest_and_holds_up_nobody(fake: FakeEngine) -> None:
    async def main() -> None:
        feed = feed_of(fake)
        slow, quick = feed.watch(), feed.watch()
        one, other = Viewed(), Viewed()
        one.feed(await next_chunk(slow))
        for _ in range(50):
            fake.step()
            while len(other.steps) < fake.listener.num_steps:
                other.feed(await next_chunk(quick))
        # Nothing was kept for it but what it has seen, and it is up to date at once.
        assert len(feed._encoded) <= 2
        one.feed(await next_chunk(slow))
        assert one.num_events == 2
        assert one.steps == other.steps
        for viewer in (slow, quick):
            viewer.close()

    run(main)


def test_only_so_many_watch(fake: FakeEngine) -> None:
    async def main() -> None:
        feed = feed_of(fake, max_viewers=2)
        viewers = [feed.watch(), feed.watch()]
        with pytest.raises(TooManyViewersError):
            feed.watch()
        viewers[0].close()
        viewers[0].close()
        assert feed.num_viewers == 1
        viewers.append(feed.watch())
        assert await next_chunk(viewers[-1])
        for viewer in viewers:
            viewer.close()
        assert feed.num_viewers == 0

    run(main)


def test_starting_ready_and_dead(fake: FakeEngine) -> None:
    async def main() -> None:
        fake.state = EngineState.STARTING
        feed = feed_of(fake)
        viewer, viewed = feed.watch(), Viewed()
        viewed.feed(await next_chunk(viewer))
        assert viewed.status == {
            "state": "starting",
            "progress": {"stage": "compiling", "done": 2, "total": 7},
        }
        fake.progress = StartProgress("compiling", 3, 7)
        viewed.feed(await next_chunk(viewer))
        assert viewed.status["progress"]["done"] == 3
        fake.state = EngineState.READY
        viewed.feed(await next_chunk(viewer))
        assert (viewed.status, len(viewed.blocks)) == ({"state": "ready"}, 10)
        fake.state = EngineState.DEAD
        viewed.feed(await next_chunk(viewer))
        # What was there last stays in the picture.
        assert (viewed.status, len(viewed.blocks)) == ({"state": "dead"}, 10)
        viewer.close()

    run(main)


@pytest.mark.parametrize("how", ["drained", "closed", "close"])
def test_streams_end_with_the_engine(fake: FakeEngine, how: str) -> None:
    async def main() -> None:
        feed = feed_of(fake)
        viewers = [feed.watch(), feed.watch()]
        for viewer in viewers:
            await next_chunk(viewer)
        fake.num_unfinished = 1
        if how == "drained":
            fake.state = EngineState.DRAINING
            assert b"draining" in await next_chunk(viewers[0])
            fake.num_unfinished = 0
        elif how == "closed":
            fake.state = EngineState.CLOSED
        else:
            feed.close()
        for viewer in (*viewers, feed.watch()):
            assert await ended(viewer)
            viewer.close()

    run(main)


async def ended(viewer: Viewer) -> bool:
    for _ in range(5):
        try:
            await next_chunk(viewer)
        except StopAsyncIteration:
            return True
    return False


def test_a_look_that_fails_is_logged_and_repeated(fake: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        good, failed = fake.block_states, []

        def fails_once() -> bytes:
            if not failed:
                failed.append(1)
                raise RuntimeError("no luck")
            return good()

        fake.block_states = fails_once  # type: ignore[method-assign]
        viewer = feed_of(fake).watch()
        assert (await next_chunk(viewer)).startswith(b"data: ")
        viewer.close()

    run(main)
    assert "could not look at the engine" in caplog.text

"""Statistics: every figure moves as it should, sums agree, and nothing grows without bound."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import jaxpaged
from jaxpaged import Engine, EngineStats, IterationRecord, SamplingParams
from jaxpaged.block_trace import CACHED, DUMMY, FREE, LIVE, PINNED, SHARED, SWAPPING
from jaxpaged.bookkeeping import _RecentRate
from jaxpaged.errors import InvalidRequestError
from jaxpaged.records import Records
from jaxpaged.runner import Runner
from tests.engine.tiny import CONFIG, GREEDY, dense_greedy, drain, idle, new_engine, prompt_of

NUM_BLOCKS, BLOCK_SIZE = 39, 4
HOST_BLOCKS = 64


@pytest.fixture(scope="module")
def swapping() -> Iterator[Engine]:
    with new_engine(num_scheduler_steps=1, num_host_blocks=HOST_BLOCKS, preemption_mode="swap") as engine:
        yield engine


def core(engine: Engine) -> Any:
    return engine._core


def submit(engine: Engine, count: int, length: int, params: SamplingParams, seed: int = 0) -> None:
    for i in range(count):
        engine.add_request(f"r{i}", prompt_of(length, seed=seed + i), params)


def new_records(engine: Engine, before: EngineStats) -> list[IterationRecord]:
    """Those of the steps since a snapshot."""
    return [record for record in engine.iteration_records() if record.step > before.num_steps]


def used_slots(engine: Engine) -> int:
    """Slots that hold something, counted block by block; what a pin alone holds is full."""
    scheduler = core(engine).scheduler
    used: Counter[int] = Counter(dict.fromkeys(scheduler.space.pins.blocks, BLOCK_SIZE))
    for request in scheduler.requests():
        for index, block in enumerate(request.table.ids):
            filled = min(BLOCK_SIZE, request.num_computed_tokens - index * BLOCK_SIZE)
            used[block] = max(used[block], filled)
    return sum(used.values())


def check_last_record(engine: Engine) -> None:
    """The newest record and a snapshot agree with each other, and with a count of everything."""
    stats, record = engine.stats(), engine.iteration_records()[-1]
    tables = [table for tables in engine.block_tables().values() for table in tables]
    holders = Counter(block for table in tables for block in table)
    holders.update(core(engine).scheduler.space.pins.holders())
    assert stats.block_holders == Counter(holders.values())
    assert stats.num_free_blocks == stats.num_blocks - len(holders)
    assert 0 <= stats.num_cached_blocks <= stats.num_free_blocks
    assert record.step == stats.num_steps
    assert (record.num_running, record.num_waiting) == (
        stats.num_requests_running,
        stats.num_requests_waiting,
    )
    assert record.num_swapped == stats.num_requests_swapped <= record.num_waiting
    assert (record.num_free_blocks, record.num_live_blocks) == (stats.num_free_blocks, len(holders))
    assert record.num_cached_blocks == stats.num_cached_blocks
    assert record.num_kv_tokens == used_slots(engine)
    assert record.internal_fragmentation == pytest.approx(stats.internal_fragmentation)


def check_sums(records: list[IterationRecord], before: EngineStats, after: EngineStats) -> None:
    """What the records tell, taken together, is what the totals tell."""
    for of_record, of_stats in {
        "num_steps": "num_steps",
        "num_scheduled_tokens": "num_tokens",
        "num_padded_tokens": "num_padded_tokens",
        "num_generation_tokens": "num_generation_tokens",
        "blocks_allocated": "blocks_allocated",
        "num_preempted": "num_preemptions",
    }.items():
        total = sum(getattr(record, of_record) for record in records)
        assert total == getattr(after, of_stats) - getattr(before, of_stats), of_record
    for part in ("build_time", "device_time", "update_time"):
        total = sum(getattr(record, part) for record in records)
        assert total == pytest.approx(getattr(after, part) - getattr(before, part)), part
    assert sum(r.num_swapped_out for r in records) == after.preemptions["swap"] - before.preemptions["swap"]
    assert all(0 <= r.num_prompt_tokens <= r.num_scheduled_tokens for r in records)
    times = [record.time for record in records]
    assert times == sorted(times)


def test_every_step_is_recorded(engine: Engine) -> None:
    """Several steps in one program, forks, prefix hits; nobody is preempted."""
    before = engine.stats()
    engine.add_request("shared", prompt_of(21), GREEDY.clone(max_tokens=20, n=2))
    engine.add_request("alone", prompt_of(17), GREEDY.clone(max_tokens=9))
    while engine.has_unfinished_requests:
        engine.step()
        check_last_record(engine)
        engine.check_invariants()
    engine.generate(prompt_of(21), GREEDY)
    after, records = engine.stats(), new_records(engine, before)
    check_sums(records, before, after)
    assert after.num_preemptions == before.num_preemptions
    assert max(record.num_steps for record in records) > 1
    # The prompts but for what was found, and the second completion's last prompt token again.
    assert sum(record.num_prompt_tokens for record in records) == 21 + 17 + (21 - 20) + 1
    # Each token but the last of a completion is computed as well.
    computed = sum(record.num_scheduled_tokens - record.num_prompt_tokens for record in records)
    dropped = computed - (2 * 20 + 9 + 16 - 4)
    assert 0 <= dropped < 3 * 8  # behind the end, in a program of several steps
    assert after.prefix_cache_hits - before.prefix_cache_hits == 20
    assert after.blocks_reused - before.blocks_reused == 5
    assert 0 < after.reuse_rate < 1
    assert 0 < after.prefix_hit_rate < 1


def test_prompt_tokens_are_told_from_new_ones(swapping: Engine) -> None:
    """Chunks of a prompt, one of which is a single token, beside rows that decode."""
    with idle(swapping) as engine:
        before = engine.stats()
        engine.add_request("first", prompt_of(5), GREEDY)
        engine.step()
        engine.add_request("long", prompt_of(16 + 15 + 1), GREEDY)
        engine.add_request("one", prompt_of(1), GREEDY)
        drain(engine)
        records = new_records(engine, before)
        check_sums(records, before, engine.stats())
        assert sum(record.num_prompt_tokens for record in records) == 5 + 32 + 1
        assert sum(r.num_scheduled_tokens - r.num_prompt_tokens for r in records) == 3 * 15


@pytest.mark.parametrize("kind", ["recompute", "swap"])
def test_preemptions(engine: Engine, swapping: Engine, kind: str) -> None:
    with idle(swapping if kind == "swap" else engine) as each:
        before = each.stats()
        submit(each, 8, 20, GREEDY.clone(max_tokens=30))
        seen = []
        while each.has_unfinished_requests:
            each.step()
            check_last_record(each)
            seen.append(each.stats())
        after, records = each.stats(), new_records(each, before)
        check_sums(records, before, after)
        assert (
            after.preemptions[kind] - before.preemptions[kind]
            == after.num_preemptions - before.num_preemptions
            > 0
        )
        assert sum(after.preemptions.values()) == after.num_preemptions
        assert (max(stats.num_requests_swapped for stats in seen) > 0) == (kind == "swap")
        assert sum(r.num_swapped_in for r in records) == sum(r.num_swapped_out for r in records)
        assert after.memory_levels_entered["critical"] + after.memory_levels_entered["warning"] > 0
        assert {stats.memory_level for stats in seen} > {"normal"}
        ended = each.request_records()[-8:]
        assert (
            sum(record.num_preemptions for record in ended) == after.num_preemptions - before.num_preemptions
        )


def test_the_host_tier(swapping: Engine) -> None:
    with idle(swapping) as engine:
        before = engine.stats()
        submit(engine, 8, 20, GREEDY.clone(max_tokens=30), seed=100)
        seen = []
        while engine.has_unfinished_requests:
            engine.step()
            seen.append(engine.stats())
        core(engine).runner.host_pool.drain()
        after = engine.stats()
        for stats in seen:
            assert stats.num_host_blocks == HOST_BLOCKS
            parts = (stats.num_host_blocks_held, stats.num_host_blocks_cached, stats.num_host_blocks_free)
            assert sum(parts) == HOST_BLOCKS
            assert min(parts) >= 0
            assert (stats.num_host_blocks_held > 0) == (stats.num_requests_swapped > 0)
        assert max(stats.num_host_blocks_held for stats in seen) > 0
        out = after.blocks_swapped_out - before.blocks_swapped_out
        assert out >= after.blocks_swapped_in - before.blocks_swapped_in > 0
        demoted = after.blocks_demoted - before.blocks_demoted
        size = core(engine).runner.host_pool.bytes_per_block
        assert 0 < after.bytes_to_host - before.bytes_to_host <= (out + demoted) * size
        assert (after.bytes_from_host - before.bytes_from_host) % size == 0
        # What was pushed out of the pool is found on the host.
        assert after.num_host_blocks_cached > 0
        outputs = engine.generate([prompt_of(20, seed=100 + i) for i in range(8)], GREEDY.clone(max_tokens=1))
        assert [o.outputs[0].token_ids for o in outputs] == [
            dense_greedy(prompt_of(20, seed=100 + i), 1) for i in range(8)
        ]
        assert engine.stats().blocks_promoted > after.blocks_promoted


def test_pins_and_cached_blocks(engine: Engine) -> None:
    assert engine.stats().num_cached_blocks == 0
    engine.pin_prefix(prompt_of(10), pin_id="p")
    engine.generate(prompt_of(10), GREEDY.clone(max_tokens=3))
    stats = engine.stats()
    assert stats.num_pinned_prefixes == 1
    assert stats.block_holders == {1: 2}
    assert stats.num_cached_blocks == 1  # the third one, full since
    check_last_record(engine)
    assert stats.internal_fragmentation == 0
    engine.unpin_prefix("p")
    stats = engine.stats()
    assert (stats.num_pinned_prefixes, stats.num_cached_blocks, stats.block_holders) == (0, 3, {})
    evicted = stats.blocks_evicted
    submit(engine, 8, 20, GREEDY)
    drain(engine)
    assert engine.stats().blocks_evicted > evicted


def test_one_request_in_a_window() -> None:
    """A token a step into blocks of four; those behind the window are given back."""
    config = replace(CONFIG, sliding_windows=(6, 6))
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "num_scheduler_steps": 1}
    with new_engine(config, **sizes) as engine:
        engine.add_request("x", prompt_of(2), GREEDY.clone(max_tokens=22))
        unused, held = [], []
        while engine.has_unfinished_requests:
            engine.step()
            engine.check_invariants()
            stats, record = engine.stats(), engine.iteration_records()[-1]
            held.append(record.num_live_blocks * BLOCK_SIZE)
            unused.append(held[-1] - record.num_kv_tokens)
            assert stats.internal_fragmentation == (unused[-1] / held[-1] if held[-1] else 0)
            assert record.num_prompt_tokens == (record.step <= 2)
        assert unused == [-step % BLOCK_SIZE for step in range(1, 23)] + [0]  # at the end nothing is held
        assert stats.kv_waste == pytest.approx(sum(unused) / sum(held))
        assert stats.blocks_trimmed == 3
        assert stats.num_compiles == len(stats.compile_events) == 1
        [event] = stats.compile_events
        assert "bucket of 1 tokens" in event.shape
        assert event.seconds == stats.compile_time
        assert event.time <= time.monotonic()


def test_requests_are_recorded_with_their_times(engine: Engine) -> None:
    ended, recorded = sum(engine.stats().finished.values()), core(engine).books.records.num_requests
    engine.add_request("n", prompt_of(21), GREEDY.clone(n=2))
    engine.add_request(
        "stopped", prompt_of(9), GREEDY.clone(stop_token_ids=[dense_greedy(prompt_of(9), 3)[2]])
    )
    engine.add_request("aborted", prompt_of(8), GREEDY)
    engine.add_request("late", prompt_of(7), GREEDY, max_queue_time=1e-9)
    engine.step()
    engine.abort_request("aborted")
    engine.add_request("never", prompt_of(8), GREEDY)
    engine.abort_request("never")
    drain(engine)
    drain(engine)
    records = engine.request_records()[-6:]  # those before may be as many as are kept
    assert {(r.request_id, r.index, r.finish_reason) for r in records} == {
        ("n", 0, "length"),
        ("n", 1, "length"),
        ("stopped", 0, "stop"),
        ("aborted", 0, "abort"),
        ("late", 0, "timeout"),
        ("never", 0, "abort"),
    }
    by_name = {(record.request_id, record.index): record for record in records}
    for name, num_tokens in ((("n", 0), 16), (("n", 1), 16), (("stopped", 0), 3)):
        record = by_name[name]
        assert record.num_generation_tokens == num_tokens
        assert record.queue_time is not None
        assert record.time_to_first_token is not None
        assert record.time_per_output_token is not None
        assert 0 <= record.queue_time <= record.time_to_first_token <= record.e2e_time
        after_first = record.time_per_output_token * (num_tokens - 1)
        assert 0 < record.time_to_first_token + after_first <= record.e2e_time
    assert by_name["n", 0].num_prompt_tokens == 21
    assert (by_name["n", 0].num_cached_tokens, by_name["n", 1].num_cached_tokens) == (0, 20)
    for name in ("never", "late"):
        assert by_name[name, 0].queue_time is by_name[name, 0].time_to_first_token is None
    assert sum(engine.stats().finished.values()) - ended == 6
    assert core(engine).books.records.num_requests - recorded == 6
    times = engine.stats().times
    assert times["queue_time"]["count"] < times["e2e_time"]["count"]
    assert times["step_time"]["p50"] <= times["step_time"]["p99"]  # type: ignore[operator]


def test_a_trace_shows_what_every_block_is(engine: Engine, swapping: Engine) -> None:
    engine.pin_prefix(prompt_of(5, seed=7), pin_id="p")
    trace = engine.trace_blocks(max_steps=500)
    assert isinstance(trace, jaxpaged.BlockTrace)
    engine.add_request("two", prompt_of(9), GREEDY.clone(n=2))
    engine.add_request("pinned", prompt_of(5, seed=7), GREEDY)
    while engine.has_unfinished_requests:
        engine.step()
        space = core(engine).scheduler.space
        states = trace.samples[-1]
        assert trace.steps[-1] == engine.stats().num_steps
        count = Counter(states)
        assert count[DUMMY] == 1
        assert states[0] == DUMMY
        assert count[FREE] + count[CACHED] == engine.stats().num_free_blocks
        assert count[CACHED] == engine.stats().num_cached_blocks
        assert {block for block, state in enumerate(states) if state == PINNED} == space.pins.blocks
        held = {block: space.allocator.count(block) for block in range(1, NUM_BLOCKS + 1)}
        assert {block for block, state in enumerate(states) if state == SHARED} == {
            block for block in held if held[block] > 1 and block not in space.pins.blocks
        }
    assert {state for sample in trace.samples for state in sample} == {
        DUMMY,
        FREE,
        CACHED,
        LIVE,
        SHARED,
        PINNED,
    }
    engine.unpin_prefix("p")
    engine.stop_tracing()
    length = len(trace)
    engine.generate(prompt_of(3), GREEDY)
    assert len(trace) == length
    with pytest.raises(InvalidRequestError, match="max_steps=1"):
        engine.trace_blocks(1)
    with idle(swapping):
        trace = swapping.trace_blocks()
        submit(swapping, 8, 20, GREEDY.clone(max_tokens=30), seed=200)
        drain(swapping)
        swapping.stop_tracing()
        assert any(SWAPPING in sample for sample in trace.samples)


def test_another_trace_takes_over(engine: Engine) -> None:
    first = engine.trace_blocks()
    engine.generate(prompt_of(3), GREEDY)
    second = engine.trace_blocks(max_steps=2)
    engine.generate(prompt_of(4), GREEDY)
    assert first.steps[-1] < second.steps[0]
    assert len(second) <= 2
    engine.stop_tracing()
    engine.stop_tracing()  # ending none is fine


def test_steps_ahead_are_recorded_when_they_are_taken_in() -> None:
    with new_engine(
        max_num_seqs=1, max_num_batched_tokens=1, async_scheduling=True, num_scheduler_steps=1
    ) as engine:
        before = engine.stats()
        submit(engine, 3, 5, GREEDY)
        for number in range(1, 5):
            engine.step()
            assert engine.stats().num_steps == number
            assert len(engine.iteration_records()) == number - 1
        drain(engine)
        check_sums(engine.iteration_records(), before, engine.stats())
        assert sum(record.num_prompt_tokens for record in engine.iteration_records()) == 3 * 5


class Unreadable:
    """Tokens of a step that failed on the device."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("lost")


def test_a_failed_step_leaves_a_record(swapping: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with idle(swapping) as engine:
        before = engine.stats()
        engine.add_request("x", prompt_of(9), GREEDY)
        lost = SimpleNamespace(sampled=SimpleNamespace(tokens=Unreadable()), prompt=None)
        with monkeypatch.context() as patch:
            patch.setattr(core(engine).runner, "execute", lambda bucket, buffer: lost)
            [output] = engine.step()
        assert isinstance(output.error, RuntimeError)
        check_sums(new_records(engine, before), before, engine.stats())
        [record] = new_records(engine, before)
        assert (record.num_scheduled_tokens, record.num_generation_tokens, record.num_running) == (9, 0, 0)
        assert engine.request_records()[-1].finish_reason == "error"
        assert engine.stats().num_cached_blocks == 0  # what it was to write cannot be found
        engine.check_invariants()


def test_blocks_and_requests_as_they_are_now(engine: Engine) -> None:
    submit(engine, 2, 9, GREEDY)
    trace = engine.trace_blocks(2)
    engine.step()
    assert engine.block_states() == trace.samples[-1]
    assert {r.request_id: [r.table.ids] for r in engine.live_requests()} == engine.block_tables()
    engine.stop_tracing()
    drain(engine)


def test_a_snapshot_stays_as_it_is(engine: Engine) -> None:
    engine.generate(prompt_of(9), GREEDY)
    first, again = engine.stats(), engine.stats()
    assert first == again  # nothing has happened in between
    for container in (first.preemptions, first.finished, first.times, first.memory_levels_entered):
        container.clear()
    first.compile_events.clear()
    assert engine.stats() == again
    copy = replace(again)
    engine.generate(prompt_of(10), GREEDY)
    assert again == copy
    assert engine.stats().blocks_allocated_per_second > 0
    assert engine.stats().device_memory_in_use is None  # a CPU does not say


def test_records_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = core(engine).books.records
    assert (kept._iterations.maxlen, kept._requests.maxlen) == (1000, 1000)
    few = Records(max_iterations=5, max_requests=3)
    monkeypatch.setattr(core(engine).books, "records", few)
    monkeypatch.setattr(core(engine).results, "records", few)
    for i in range(4):
        engine.generate(prompt_of(3 + i), GREEDY)
        engine.check_invariants()
    assert (len(engine.iteration_records()), len(engine.request_records())) == (5, 3)
    assert few.num_requests == 4
    assert engine.stats().times["e2e_time"]["count"] == 3


def test_device_memory_is_what_the_device_says() -> None:
    def in_use(*devices: Any) -> int | None:
        pool = SimpleNamespace(arrays=(SimpleNamespace(devices=lambda: set(devices)),))
        runner: Any = SimpleNamespace(state=SimpleNamespace(pool=pool))
        return Runner.device_memory_in_use.fget(runner)  # type: ignore[attr-defined, no-any-return]

    class Device(SimpleNamespace):
        __hash__ = object.__hash__  # type: ignore[assignment]

    first = Device(id=0, memory_stats=lambda: {"bytes_in_use": 7, "bytes_limit": 9})
    second = Device(id=1, memory_stats=lambda: {"bytes_in_use": 8})
    assert in_use(second, first) == 7
    assert in_use(Device(id=0, memory_stats=lambda: None)) is None


def test_rate_over_the_last_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rate = _RecentRate()
    assert rate.value == 0
    rate.note(100.5, 2)
    assert rate.value == 4  # since the start
    for step in range(1, 301):  # 10 a second
        rate.note(100.5 + 0.1 * step, 2 + step)
    assert rate.value == pytest.approx(10)
    assert len(rate._marks) <= 13
    for step in range(1, 301):  # and 20
        rate.note(130.5 + 0.1 * step, 302 + 2 * step)
    assert rate.value == pytest.approx(20)
    rate.note(1000.0, 952)  # a pause of minutes counts for no more than the ten seconds
    assert rate.value == pytest.approx(50 / 11)

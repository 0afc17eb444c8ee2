"""The trace of block states: what each state means, and that a long run stays whole in bounded memory."""

from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.block_allocator import BlockAllocator
from jaxpaged.block_trace import (
    CACHED,
    DUMMY,
    FREE,
    LIVE,
    PINNED,
    SHARED,
    STATE_NAMES,
    SWAPPING,
    BlockTrace,
    block_states,
)
from jaxpaged.errors import InvalidRequestError
from jaxpaged.prefix_cache import PrefixCache


def pool() -> tuple[BlockAllocator, PrefixCache]:
    """Eight blocks: 1 live, 2 shared, 3 live and findable, 4 free and findable, 5 free again, the rest untouched."""
    cache = PrefixCache()
    allocator = BlockAllocator(8, on_reuse=cache.forget)
    for _ in range(5):
        allocator.allocate()
    allocator.hold(2)
    cache.add(3, b"three")
    cache.add(4, b"four")
    allocator.release([5, 4])
    return allocator, cache


def test_names_are_in_the_order_of_the_constants() -> None:
    assert [STATE_NAMES[s] for s in (FREE, CACHED, LIVE, SHARED, PINNED, SWAPPING, DUMMY)] == list(
        STATE_NAMES
    )


def test_states() -> None:
    expected = [DUMMY, LIVE, SHARED, LIVE, CACHED, FREE, FREE, FREE]
    assert list(block_states(*pool())) == expected


def test_pinned_and_swapping_win() -> None:
    states = block_states(*pool(), pinned={2, 4}, swapping=[1, 4])
    assert list(states) == [DUMMY, SWAPPING, PINNED, LIVE, SWAPPING, FREE, FREE, FREE]


def test_a_new_owner_ends_a_cached_prefix() -> None:
    allocator, cache = pool()
    while allocator.num_free:
        allocator.allocate()
    assert list(block_states(allocator, cache)) == [DUMMY, LIVE, SHARED, *[LIVE] * 5]


def test_samples_come_back_as_recorded() -> None:
    trace = BlockTrace(3)
    trace.record(1, bytes([DUMMY, FREE, LIVE]))
    trace.record(9, bytearray([DUMMY, LIVE, LIVE]))
    assert trace.steps == [1, 9]
    assert trace.samples == [bytes([DUMMY, FREE, LIVE]), bytes([DUMMY, LIVE, LIVE])]
    assert repr(trace) == "BlockTrace(2 samples of 3 blocks, stride=1)"
    trace.check_invariants()


def test_a_step_that_comes_again_replaces_its_sample() -> None:
    trace = BlockTrace(2)
    trace.record(1, bytes([DUMMY, FREE]))
    trace.record(2, bytes([DUMMY, FREE]))
    trace.record(2, bytes([DUMMY, LIVE]))
    assert (trace.steps, trace.samples[1]) == ([1, 2], bytes([DUMMY, LIVE]))
    trace.check_invariants()


def test_observe_records_the_states() -> None:
    allocator, cache = pool()
    trace = BlockTrace(8)
    trace.observe(1, allocator, cache, {1}, {2})
    assert trace.samples == [block_states(allocator, cache, {1}, {2})]
    trace.check_invariants()


def test_states_that_are_not_kept_are_not_computed() -> None:
    class Counting(PrefixCache):
        num_looks = 0

        @property
        def blocks(self) -> Collection[int]:
            self.num_looks += 1
            return super().blocks

    allocator, cache = BlockAllocator(2), Counting()
    trace = BlockTrace(2, max_steps=4)
    for step in range(1, 33):
        trace.observe(step, allocator, cache)
    assert (trace.steps, trace.stride) == ([1, 9, 17, 25], 8)
    assert cache.num_looks == 4 + 2 + 2 + 2  # after each halving two more samples


@pytest.mark.parametrize("num_holders", [2, 255, 256, 1000])
def test_blocks_of_many_holders_are_shared(num_holders: int) -> None:
    allocator, cache = BlockAllocator(4), PrefixCache()
    block = allocator.allocate()
    for _ in range(num_holders - 1):
        allocator.hold(block)
    assert block_states(allocator, cache)[block] == SHARED


@given(st.integers(2, 9), st.integers(0, 80))
def test_a_long_run_stays_whole(max_steps: int, num_steps: int) -> None:
    trace = BlockTrace(2, max_steps)
    for step in range(num_steps):
        trace.record(step, bytes([DUMMY, step % 2]))
        trace.check_invariants()
    assert trace.steps == list(range(0, num_steps, trace.stride))
    assert trace.samples == [bytes([DUMMY, step % 2]) for step in trace.steps]
    # No coarser than it must be: with half the stride it would not fit.
    assert trace.stride == 1 or -(-num_steps // (trace.stride // 2)) > max_steps


def test_what_is_handed_out_is_a_copy() -> None:
    trace = BlockTrace(1)
    trace.record(1, bytes([DUMMY]))
    trace.steps.clear()
    trace.samples.clear()
    assert len(trace) == 1


@pytest.mark.parametrize("max_steps", [1, 0, -3, True, 2.5, None])
def test_bad_limits_are_refused(max_steps: Any) -> None:
    with pytest.raises(InvalidRequestError, match="max_steps"):
        BlockTrace(4, max_steps)


@pytest.mark.parametrize(("step", "states"), [(5, bytes(3)), (4, bytes(2))])
def test_a_wrong_record_is_our_bug(step: int, states: bytes) -> None:
    trace = BlockTrace(2)
    trace.record(5, bytes(2))
    trace.record(6, bytes(2))
    with pytest.raises(AssertionError, match=r"one byte|do not go back"):
        trace.record(step, states)

"""The block allocator against a model of plain Python sets and lists."""

import time
from collections import Counter
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxpaged.block_allocator import BlockAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """The model: holders of each block, and the free blocks in the order of becoming free."""

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks: int) -> None:
        self.reused: list[int] = []
        self.cached: set[int] = set()
        self.allocator = BlockAllocator(num_blocks, on_reuse=self.reuse, cached=self.cached)
        self.holders: dict[int, int] = {}
        self.free = list(range(1, num_blocks))

    def reuse(self, block: int) -> None:
        self.reused.append(block)
        self.cached.discard(block)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        self.cached.add(data.draw(st.sampled_from(sorted(self.holders))))

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.cached.remove(data.draw(st.sampled_from(sorted(self.cached))))
        self.allocator.recount_cached()

    @precondition(lambda self: self.free)
    @rule()
    def allocate(self) -> None:
        expected = self.free.pop(0)
        assert self.allocator.allocate() == expected, "not the longest unused block"
        assert self.reused[-1] == expected
        self.holders[expected] = 1

    @precondition(lambda self: not self.free)
    @rule()
    def allocate_from_nothing(self) -> None:
        with pytest.raises(IndexError):
            self.allocator.allocate()

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(1, self.allocator.num_blocks - 1))
        before = len(self.reused)
        self.allocator.hold(block)
        assert len(self.reused) == before, "holding a free block keeps its content"
        self.holders[block] = self.holders.get(block, 0) + 1
        if block in self.free:
            self.free.remove(block)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.holders)), unique=True, max_size=4))
        self.allocator.release(blocks)
        for block in blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                del self.holders[block]
                self.free.append(block)

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def release_too_often(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.free))
        with pytest.raises(ValueError, match=f"block={block}: released more often"):
            self.allocator.release([block])

    @rule(out_of_range=st.sampled_from([-1, 0, 9, 100]))
    def foreign_block(self, out_of_range: int) -> None:
        hypothesis.assume(out_of_range < 1 or out_of_range >= self.allocator.num_blocks)
        with pytest.raises(ValueError, match=f"block={out_of_range}"):
            self.allocator.hold(out_of_range)
        with pytest.raises(ValueError, match=f"block={out_of_range}"):
            self.allocator.release([out_of_range])

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "allocator"):
            return
        self.allocator.check_invariants(self.holders)
        assert self.allocator.num_free == len(self.free)
        assert self.allocator.num_live == len(self.holders)
        assert self.allocator.num_free + self.allocator.num_live == self.allocator.num_usable
        assert self.allocator.num_cached == len(self.cached.intersection(self.free))
        assert self.allocator.holders == Counter(self.holders.values())
        assert list(self.allocator.holders) == sorted(self.allocator.holders)
        for block in range(1, self.allocator.num_blocks):
            assert self.allocator.is_free(block) == (block in self.free) == (block not in self.holders)
            assert self.allocator.count(block) == self.holders.get(block, 0)


TestAllocator: Any = AllocatorMachine.TestCase
TestAllocator.settings = hypothesis.settings(max_examples=60, stateful_step_count=40)


@pytest.mark.parametrize("num_blocks", [-1, 0, 1])
def test_a_pool_needs_a_block_besides_the_dummy(num_blocks: int) -> None:
    with pytest.raises(ValueError, match=f"num_blocks={num_blocks}"):
        BlockAllocator(num_blocks)


def seconds_of_churn(num_blocks: int, operations: int) -> float:
    """Time of allocating and releasing out of order while the pool is three quarters full."""
    allocator = BlockAllocator(num_blocks)
    held = [allocator.allocate() for _ in range(3 * num_blocks // 4)]
    started = time.process_time()
    for i in range(operations):
        at = i * 7919 % len(held)
        allocator.release([held[at]])
        held[at] = allocator.allocate()
        allocator.hold(held[at])
        allocator.release([held[at]])
    return time.process_time() - started


def test_operations_do_not_depend_on_the_size_of_the_pool() -> None:
    small = min(seconds_of_churn(64, 25_000) for _ in range(3))
    large = min(seconds_of_churn(200_000, 25_000) for _ in range(3))
    assert large < 2.0, "100,000 operations"
    # Cache misses make a large pool somewhat slower; a search through it would make it a thousand times slower.
    assert large < 20 * small

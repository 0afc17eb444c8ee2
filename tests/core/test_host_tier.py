"""The host tier against a model of plain lists, and what copies in the order of its calls would move."""

import time
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxpaged.host_tier import HostTier

DIGESTS = st.integers(0, 9).map(lambda n: bytes([n]) * 32)


class HostTierMachine(RuleBasedStateMachine):
    """The model: what each request holds, and the cached digests, least recently used first.

    ``planned`` are the copies that the calls ask for, in their order; at the end of a pass they are run, and every
    load must find what it came for.
    """

    @initialize(num_blocks=st.integers(0, 6))
    def start(self, num_blocks: int) -> None:
        self.tier = HostTier(num_blocks)
        self.requests: dict[int, list[int]] = {}
        self.cached: list[bytes] = []
        self.block_of: dict[bytes, int] = {}
        self.num_evicted = 0
        self.num_requests = 0
        self.planned: list[tuple[str, int, object]] = []
        self.content: dict[int, object] = {}

    @property
    def num_held(self) -> int:
        return sum(map(len, self.requests.values()))

    @property
    def num_free(self) -> int:
        return self.tier.num_blocks - self.num_held - len(self.cached)

    def expect_evictions(self, count: int) -> set[int]:
        """The blocks of the ``count`` least recently used prefixes, which leave the model."""
        gone, self.cached = self.cached[:count], self.cached[count:]
        self.num_evicted += len(gone)
        return {self.block_of.pop(digest) for digest in gone}

    @rule(count=st.integers(0, 4))
    def hold(self, count: int) -> None:
        if count > self.num_free + len(self.cached):
            assert self.tier.hold(count) is None, "more than there is"
            return
        evicted = self.expect_evictions(max(0, count - self.num_free))
        blocks = self.tier.hold(count)
        assert blocks is not None
        assert len(set(blocks)) == count
        assert set(blocks) >= evicted, "a prefix went that was used more recently"
        assert not set(blocks) & set(self.block_of.values()), "a prefix went although a block was free"
        self.num_requests += 1
        self.requests[self.num_requests] = blocks
        self.planned += [("store", block, (self.num_requests, i)) for i, block in enumerate(blocks)]

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), comes_back=st.booleans())
    def release(self, data: st.DataObject, comes_back: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        blocks = self.requests.pop(name)
        if comes_back:
            self.planned += [("load", block, (name, i)) for i, block in enumerate(blocks)]
        self.tier.release(blocks)

    @rule(digest=DIGESTS)
    def store(self, digest: bytes) -> None:
        if digest in self.cached:
            assert self.tier.store(digest) is None, "stored twice"
            self.cached.remove(digest)
            self.cached.append(digest)
            return
        if self.num_held == self.tier.num_blocks:
            assert self.tier.store(digest) is None, "took a block from a holder"
            return
        evicted = set() if self.num_free else self.expect_evictions(1)
        block = self.tier.store(digest)
        assert block is not None
        assert not evicted or {block} == evicted
        self.cached.append(digest)
        self.block_of[digest] = block
        self.planned.append(("store", block, digest))

    @rule(digest=DIGESTS, touch=st.booleans())
    def find(self, digest: bytes, touch: bool) -> None:
        block = self.tier.find(digest)
        assert block == self.block_of.get(digest)
        if block is not None:
            self.planned.append(("load", block, digest))
        if touch:
            assert self.tier.touch(digest) == (block is not None)
            if block is not None:
                self.cached.remove(digest)
                self.cached.append(digest)

    @rule(digest=DIGESTS)
    def forget(self, digest: bytes) -> None:
        assert self.tier.forget(digest) == (digest in self.cached)
        if self.block_of.pop(digest, None) is not None:
            self.cached.remove(digest)

    @rule()
    def end_of_pass(self) -> None:
        for kind, block, what in self.planned:
            if kind == "store":
                self.content[block] = what
            else:
                assert self.content[block] == what, "a load reads what somebody else stored"
        self.planned.clear()

    @precondition(lambda self: len(self.cached) > 2)
    @rule()
    def clear(self) -> None:
        self.tier.clear()
        self.cached.clear()
        self.block_of.clear()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "tier"):
            return
        tier = self.tier
        tier.check_invariants([block for blocks in self.requests.values() for block in blocks])
        assert (tier.num_held, tier.num_cached, tier.num_free) == (
            self.num_held,
            len(self.cached),
            self.num_free,
        )
        assert tier.num_available == tier.num_free + tier.num_cached == tier.num_blocks - tier.num_held
        assert tier.num_evicted == self.num_evicted
        for digest in self.cached:
            assert tier.find(digest) == self.block_of[digest], "a prefix moved"


TestHostTier: Any = HostTierMachine.TestCase
TestHostTier.settings = hypothesis.settings(max_examples=80, stateful_step_count=40)


@pytest.mark.parametrize("blocks", [[0], [2], [3, 3], [3, -1], [7]])
def test_a_wrong_release_changes_nothing(blocks: list[int]) -> None:
    tier = HostTier(5)
    assert tier.hold(5) == [0, 1, 2, 3, 4]
    tier.release([0, 1])
    cached = tier.store(b"x" * 32)
    assert cached == 1, "the block used last, whose memory is there"
    tier.release([2])
    with pytest.raises(ValueError, match="blocks="):
        tier.release([4, *blocks])
    tier.check_invariants([3, 4])
    assert tier.find(b"x" * 32) == cached


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks=-1"):
        HostTier(-1)
    tier = HostTier(2)
    with pytest.raises(ValueError, match="count=-1"):
        tier.hold(-1)
    tier.check_invariants([])


@pytest.mark.parametrize("held", [[], [0], [0, 1, 2], [0, 0, 1]])
def test_a_holder_that_the_tier_does_not_know_of_is_noticed(held: list[int]) -> None:
    tier = HostTier(3)
    assert tier.hold(2) == [0, 1]
    with pytest.raises(AssertionError):
        tier.check_invariants(held)


def seconds_of_churn(num_blocks: int, operations: int) -> float:
    """Time of storing, finding, holding and releasing while the tier is full, half of it held."""
    tier = HostTier(num_blocks)
    assert tier.hold(num_blocks // 2)
    for i in range(num_blocks):
        tier.store(i.to_bytes(32))
    started = time.process_time()
    for i in range(num_blocks, num_blocks + operations):
        tier.store(i.to_bytes(32))
        tier.touch((i - num_blocks // 4).to_bytes(32))
        tier.find((i - num_blocks).to_bytes(32))
        blocks = tier.hold(2)
        assert blocks is not None
        tier.release(blocks)
    return time.process_time() - started


def test_operations_do_not_depend_on_the_size_of_the_tier() -> None:
    small = min(seconds_of_churn(64, 10_000) for _ in range(3))
    large = min(seconds_of_churn(100_000, 10_000) for _ in range(3))
    # Cache misses make a large tier somewhat slower; a search through it would make it a thousand times slower.
    assert large < 20 * small

"""Prefix cache and block space: what is found is what was computed, and nothing else."""

from collections import Counter
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxpaged.block_space import BlockSpace
from jaxpaged.prefix_cache import PrefixCache, block_hashes
from jaxpaged.request import Request
from jaxpaged.step_plan import MoveKind
from tests.core.pool_model import make_request

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=12)


class BlockSpaceMachine(RuleBasedStateMachine):
    """Requests that grow, publish, fork and leave, over a model of what each block holds."""

    @initialize(num_blocks=st.integers(4, 16), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.space = BlockSpace(num_blocks, block_size)
        self.requests: list[Request] = []
        self.content: dict[int, tuple[Any, ...]] = {}  # by block: salt and the prefix that ends in it

    def blocks_of(self, request: Request) -> list[int]:
        return request.table.ids[: request.num_computed_tokens // self.space.block_size]

    def prefix(self, request: Request, index: int) -> tuple[Any, ...]:
        end = (index + 1) * self.space.block_size
        return (request.cache_salt, *request.token_ids[:end])

    @rule(prompt=TOKENS, salt=st.sampled_from([None, None, "a", "b"]))
    def admit(self, prompt: list[int], salt: str | None) -> None:
        (request,) = make_request("r", prompt, block_size=self.space.block_size, salt=salt)
        entry = self.space.plan_entry(request)
        assert entry.tables is not None
        found = entry.tables[0]
        size = self.space.block_size
        assert len(found) * size < len(prompt), "the last token must be computed"
        for index, block in enumerate(found):
            assert self.content[block] == self.prefix(request, index), "found another prefix"
        # The longest prefix there is: the next block is cached nowhere, or holds the last token.
        longer = (len(found) + 1) * size
        if longer < len(prompt):
            cached = {content for block, content in self.content.items() if block in self.space.cache}
            assert self.prefix(request, len(found)) not in cached, "a longer prefix is cached"
        assert entry.num_computed_tokens == len(found) * size
        if self.space.blocks_to_enter(request, entry, len(prompt)) > self.space.num_free:
            return
        self.space.enter(request, entry)
        self.requests.append(request)
        self.compute(request, len(prompt))

    def compute(self, request: Request, target: int) -> None:
        copied = self.space.grow(request, target)
        moves = self.space.take_moves()
        assert copied == bool(moves)
        for kind, source, copy in moves:
            assert kind is MoveKind.COPY
            assert self.space.allocator.count(source) >= 1, "the copy was not needed"
            assert copy in request.table.ids
        size = self.space.block_size
        first, last = request.num_computed_tokens // size, (target - 1) // size
        for block in request.table.ids[first : last + 1]:
            assert self.space.allocator.count(block) == 1, "a shared block is written"
            assert block not in self.space.cache or not copied
            self.content.pop(block, None)
        for index in range(first, last + 1):
            written = request.token_ids[: min(target, (index + 1) * size)]
            self.content[request.table.ids[index]] = (request.cache_salt, *written)
        self.space.publish(request, target)
        self.space.unused.written(target - request.num_computed_tokens)
        request.num_computed_tokens = target

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if self.space.blocks_to_grow(request, request.num_tokens + 1) > self.space.num_free:
            return
        request.append(token)
        self.compute(request, request.num_tokens)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), token=st.integers(0, 1))
    def fork(self, data: st.DataObject, token: int) -> None:
        """A request that begins with any of its parent's tokens, and writes behind them."""
        parent = data.draw(st.sampled_from(self.requests))
        shared = data.draw(st.integers(0, parent.num_tokens))
        (child,) = make_request(
            "c",
            [*parent.token_ids[:shared], token],
            block_size=self.space.block_size,
            salt=parent.cache_salt,
        )
        assert self.space.fork(parent, child, shared) == (shared <= parent.num_computed_tokens)
        assert child.num_computed_tokens == shared
        if self.space.blocks_to_grow(child, child.num_tokens) > self.space.num_free:
            self.space.release(child)
            return
        self.requests.append(child)
        self.compute(child, child.num_tokens)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.requests.remove(request)
        self.space.release(request)
        assert not request.table.ids
        assert request.num_computed_tokens == 0

    @rule()
    def new_weights(self) -> None:
        self.space.forget_everything()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "space"):
            return
        self.space.check_invariants(self.requests)
        for request in self.requests:
            for index, block in enumerate(self.blocks_of(request)):
                assert self.content[block] == self.prefix(request, index), "a block was overwritten"
        for block in range(1, self.space.num_blocks):
            key = self.space.cache.key_of(block)
            if key is not None:
                salt, *tokens = self.content[block]
                wanted = block_hashes(tokens, self.space.block_size, salt=salt)[-1:]
                assert wanted == [key], "a cached block holds something else"
        for block in self.space.cache.blocks:
            salt, *tokens = self.content[block]
            digest = block_hashes(tokens, self.space.block_size, salt=salt)[-1]
            assert self.space.cache.key_of(block) == digest, "would be found as what it is not"
        self.agrees_on_slots()

    def agrees_on_slots(self) -> None:
        """What is unused, cached and shared, counted block by block."""
        space, size = self.space, self.space.block_size
        filled: Counter[int] = Counter()
        for request in self.requests:
            for index, block in enumerate(request.table.ids):
                filled[block] = max(filled[block], min(size, request.num_computed_tokens - index * size))
        assert space.unused.count() == sum(size - tokens for tokens in filled.values())
        free = [block for block in range(1, space.num_blocks) if space.allocator.is_free(block)]
        assert space.allocator.num_cached == len([block for block in free if block in space.cache])
        held = Counter(space.allocator.count(block) for block in filled)
        assert space.allocator.holders == held


TestBlockSpace: Any = BlockSpaceMachine.TestCase
TestBlockSpace.settings = hypothesis.settings(max_examples=80, stateful_step_count=40)


@pytest.mark.parametrize(
    ("tokens", "num_found"),
    [([0, 1, 2, 3, 4, 9, 9, 9], 4), ([0, 1, 2, 3, 4, 9], 4), ([0, 1, 2, 3, 4, 5, 6, 7], 8)],
    ids=["another block", "an unfinished block", "the same block"],
)
def test_a_branch_that_is_left_alone_with_a_full_block(tokens: list[int], num_found: int) -> None:
    """It writes in place. What it overwrites with something else must not be found as what it was."""
    space, prompt = BlockSpace(8, 4), list(range(9))
    (parent,) = make_request("parent", prompt, block_size=4)
    (child,) = make_request("child", tokens, block_size=4)
    space.enter(parent, space.plan_entry(parent))
    space.grow(parent, 9)
    space.publish(parent, 9)
    space.unused.written(9)
    parent.num_computed_tokens = 9
    assert space.fork(parent, child, 5)
    space.release(parent)
    assert not space.grow(child, len(tokens))
    (again,) = make_request("again", prompt, block_size=4)
    assert space.plan_entry(again).num_computed_tokens == num_found
    space.check_invariants([child])


class PrefixCacheMachine(RuleBasedStateMachine):
    """The two maps alone, against one dict."""

    digests = st.binary(min_size=1, max_size=1)

    @initialize()
    def start(self) -> None:
        self.cache = PrefixCache()
        self.model: dict[bytes, int] = {}

    @rule(block=st.integers(1, 6), digest=digests)
    def add(self, block: int, digest: bytes) -> None:
        fits = digest not in self.model and block not in self.model.values()
        assert self.cache.add(block, digest) == fits
        if fits:
            self.model[digest] = block

    @rule(block=st.integers(1, 6))
    def forget(self, block: int) -> None:
        assert self.cache.forget(block) == (block in self.model.values())
        self.model = {d: b for d, b in self.model.items() if b != block}

    @rule(chain=st.lists(digests, max_size=4))
    def find(self, chain: list[bytes]) -> None:
        expected = []
        for digest in chain:
            if digest not in self.model:
                break
            expected.append(self.model[digest])
        assert self.cache.find(chain) == expected

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.model.clear()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        assert len(self.cache) == len(self.model)
        assert all((block in self.cache) == (block in self.model.values()) for block in range(1, 7))


TestPrefixCache: Any = PrefixCacheMachine.TestCase
TestPrefixCache.settings = hypothesis.settings(max_examples=40)


@hypothesis.given(TOKENS, st.integers(1, 4), st.integers(0, 4))
def test_hashes_can_be_continued(tokens: list[int], block_size: int, known: int) -> None:
    whole = block_hashes(tokens, block_size)
    assert len(whole) == len(tokens) // block_size
    known = min(known, len(whole))
    assert whole[:known] + block_hashes(tokens, block_size, whole[:known]) == whole


def test_a_hash_names_the_whole_prefix_and_the_salt() -> None:
    first, second = block_hashes([1, 2, 3, 4], 2), block_hashes([9, 2, 3, 4], 2)
    assert len({*first, *second}) == 4, "equal tokens after different ones are not equal prefixes"
    salts = [block_hashes([1, 2], 2, salt=salt)[0] for salt in (None, "", "a", "b")]
    assert len(set(salts)) == 4
    assert block_hashes([2**40, 1], 2) != block_hashes([1, 2**40], 2)


@pytest.mark.parametrize(("caching", "prompt_logprobs"), [(False, None), (True, 0)])
def test_nothing_is_found_when_it_must_not_be(caching: bool, prompt_logprobs: int | None) -> None:
    """Without caching, or when every prompt token's logits are wanted."""
    space = BlockSpace(8, 2, caching)
    (first,) = make_request("a", [1, 2, 3], block_size=2)
    space.grow(first, 3)
    assert bool(space.publish(first, 3)) == caching
    (second,) = make_request("b", [1, 2, 3], block_size=2)
    second.needs_all_logits = prompt_logprobs is not None
    entry = space.plan_entry(second)
    assert (entry.num_computed_tokens, entry.tables) == (0, [[]])

"""What requests hold of the KV memory, told in small stories; the machines have the invariants."""

import time

import pytest

from jaxpaged.block_space import BlockSpace, Entry
from jaxpaged.host_tier import HostTier
from jaxpaged.request import Request
from jaxpaged.step_plan import Move, MoveKind
from tests.core.pool_model import make_request, make_scheduler


def request_of(space: BlockSpace, tokens: list[int], name: str = "r") -> Request:
    (request,) = make_request(name, tokens, block_size=space.block_size, num_tables=len(space.windows))
    return request


def compute(space: BlockSpace, request: Request, target: int) -> None:
    """What the scheduler does with a request that catches up to ``target``."""
    space.trim(request)
    assert space.blocks_to_grow(request, target) <= space.num_free
    space.grow(request, target)
    space.publish(request, target)
    space.unused.written(target - request.num_computed_tokens)
    request.num_computed_tokens = target


def entered(space: BlockSpace, tokens: list[int], name: str = "r") -> Request:
    request = request_of(space, tokens, name)
    space.enter(request, space.plan_entry(request))
    return request


def test_a_fork_left_alone_with_a_published_block_of_its_parents_writes_to_it_unseen() -> None:
    """The block is the child's own now, so no copy is needed, but what it will hold is not what its key says."""
    space = BlockSpace(8, 4)
    parent = entered(space, [1, 2, 3, 4, 5])
    compute(space, parent, 5)
    child = request_of(space, [1, 2, 9], "child")
    assert space.fork(parent, child, 2)
    space.release(parent)
    compute(space, child, 3)
    assert space.take_moves() == []
    assert child.table.ids == [1], "in place"
    assert space.plan_entry(request_of(space, [1, 2, 3, 4, 5])).num_computed_tokens == 0
    child.token_ids.append(8)
    compute(space, child, 4)
    assert space.plan_entry(request_of(space, [1, 2, 9, 8, 0])).num_computed_tokens == 4, "its own is found"


def test_what_is_swapped_out_is_what_the_window_reaches() -> None:
    """Were it more, a request might not fit again beside the step that it wants to make."""
    space = BlockSpace(20, 2, windows=(3,), host=HostTier(10))
    request = entered(space, list(range(12)))
    compute(space, request, 11)
    assert request.table.ids == [1, 2, 3, 4, 5, 6]
    assert space.swap_out(request)
    assert request.host_tables == [[-1, -1, -1, -1, 0, 1]], "positions 9 and 10, in two blocks"
    assert space.take_moves() == [Move(MoveKind.SWAP_OUT, 5, 0), Move(MoveKind.SWAP_OUT, 6, 1)]
    assert space.num_free == 19


def test_several_steps_at_a_time_give_back_what_lies_behind_the_window() -> None:
    """They pass every beginning of a block, where a step of one token looks."""
    scheduler = make_scheduler(num_blocks=40, block_size=2, windows=(3,), num_scheduler_steps=2)
    (request,) = make_request("r", [1, 2, 3], block_size=2, max_tokens=41)
    scheduler.add(request)
    scheduler.update(scheduler.schedule(), [7])
    for _ in range(15):
        step = scheduler.schedule()
        assert (step.num_steps, request.num_computed_tokens % 2) == (2, 1)
        assert sum(block > 0 for block in request.table) <= 4
        scheduler.advance(step)
        for _ in range(2):
            scheduler.collect(step, [7])


def test_trimming_gives_back_what_no_later_token_attends_to() -> None:
    space = BlockSpace(40, 2, windows=(None, 3, 5))
    request = entered(space, list(range(20)))
    compute(space, request, 9)
    assert [len(table) for table in request.tables] == [5, 5, 5]
    space.trim(request)  # the next token is 9: it attends to 7..9 and 5..9
    assert [[block > 0 for block in table] for table in request.tables] == [
        [True, True, True, True, True],
        [False, False, False, True, True],
        [False, False, True, True, True],
    ]
    assert (space.stats.trimmed, space.num_free) == (5, 29)
    space.trim(request)
    assert space.stats.trimmed == 5, "once"
    compute(space, request, 20)
    space.release(request)
    assert space.num_free == 39, "holes are not given back again"


@pytest.mark.parametrize("windows", [(None,), (1,), (3,), (None, 3), (2, None, 7), (50,)])
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 2, 5, 30])
def test_no_request_needs_more_than_its_peak_and_some_need_that(
    windows: tuple[int | None, ...], block_size: int, chunk: int
) -> None:
    most = 0
    for first in range(1, chunk + 1):  # where the chunks begin decides how many blocks they touch
        space = BlockSpace(200, block_size, False, windows)
        request = entered(space, list(range(40)))
        target = first
        while request.num_computed_tokens < 40:
            compute(space, request, min(target, 40))
            most = max(most, space.allocator.num_live)
            target += chunk
    every = -(-40 // block_size)
    peak = BlockSpace(200, block_size, windows=windows).peak_blocks(40, chunk)
    assert most <= peak <= every * len(windows)
    assert most == peak or len(windows) > 1, "exact, but that groups may need their most at different times"


def test_a_prefix_is_found_when_the_window_finds_its_last_blocks() -> None:
    space = BlockSpace(12, 2, windows=(3,))
    first = entered(space, list(range(12)))
    compute(space, first, 12)
    ids = list(first.table.ids)
    space.release(first)
    for block in ids[:4]:
        space.unpublish([block])
    entry = space.plan_entry(request_of(space, [*range(12), 99]))
    assert (entry.num_computed_tokens, entry.tables) == (12, [[0, 0, 0, 0, 0, ids[5]]]), (
        "token 12 sees 10 and 11"
    )
    entry = space.plan_entry(request_of(space, [*range(11), 99]))
    assert (entry.num_computed_tokens, entry.tables) == (10, [[0, 0, 0, 0, ids[4]]]), "token 10 sees 8 and 9"
    entry = space.plan_entry(request_of(space, [*range(9), 99]))
    assert (entry.num_computed_tokens, entry.tables) == (0, [[]]), "token 8 would see 6 and 7, which are gone"
    second = request_of(space, [*range(12), 99])
    space.enter(second, space.plan_entry(second))
    assert space.allocator.num_live == 1
    compute(space, second, 13)
    space.check_invariants([second])


def test_a_window_of_one_token_needs_nothing_of_a_prefix() -> None:
    space = BlockSpace(12, 2, windows=(1,))
    assert space.plan_entry(request_of(space, list(range(7)))) == Entry(6, [[0, 0, 0]])


def test_a_prefix_ends_where_any_group_has_lost_a_block_it_needs() -> None:
    space = BlockSpace(30, 2, windows=(None, 3))
    first = entered(space, list(range(12)))
    compute(space, first, 12)
    full, windowed = [list(table) for table in first.tables]
    space.release(first)
    space.unpublish([windowed[5]])
    again = request_of(space, [*range(12), 99])
    assert space.plan_entry(again).tables == [full[:5], [0, 0, 0, 0, windowed[4]]]
    space.unpublish([full[3]])
    assert space.plan_entry(again).tables == [full[:3], [0, 0, windowed[2]]]
    space.unpublish([full[0]])
    assert space.plan_entry(again).tables == [[], []]


def test_a_fork_behind_the_window_has_nothing_to_share() -> None:
    space = BlockSpace(30, 2, windows=(None, 3))
    parent = entered(space, list(range(12)))
    compute(space, parent, 9)
    compute(space, parent, 12)  # what token 9 does not see is gone: 0..5
    for at, shares in ((12, True), (8, True), (7, False), (3, False), (13, False)):
        child = request_of(space, [*range(at), 99], "child")
        assert space.fork(parent, child, at) == shares
        assert (child.num_computed_tokens, child.holds_blocks) == ((at, True) if shares else (0, False))
        if shares:
            assert (
                child.tables[1].ids
                == [0] * ((at - 2) // 2) + parent.tables[1].ids[(at - 2) // 2 : -(-at // 2)]
            )
            compute(space, child, at + 1)
            space.check_invariants([parent, child])
            space.release(child)


def test_an_evicted_prefix_goes_to_the_host_and_comes_back() -> None:
    space = BlockSpace(4, 2, host=HostTier(2))
    first = entered(space, [1, 2, 3, 4, 5])
    compute(space, first, 5)
    space.release(first)
    other = entered(space, [9] * 6)
    compute(space, other, 6)
    # The last block was not full. Of the others the beginning of the prefix was kept the longest.
    assert space.take_moves() == [Move(MoveKind.SWAP_OUT, 2, 0), Move(MoveKind.SWAP_OUT, 1, 1)]
    space.release(other)
    again = request_of(space, [1, 2, 3, 4, 5])
    entry = space.plan_entry(again)
    assert (entry.num_computed_tokens, entry.tables) == (4, [[-2, -1]])
    assert space.blocks_to_enter(again, entry, 5) == 3
    space.enter(again, entry)
    # Loading evicts prefixes, whose stores must not hit host blocks that are still to be loaded.
    assert space.take_moves() == [
        Move(MoveKind.SWAP_IN, 1, again.table.ids[0]),
        Move(MoveKind.SWAP_IN, 0, again.table.ids[1]),
    ]
    space.grow(again, 5)
    space.check_invariants([again])
    assert (space.stats.demoted, space.stats.promoted, space.stats.evicted) == (3, 2, 5)


def test_prefixes_that_a_failed_step_was_to_store_are_not_found_on_the_host() -> None:
    space = BlockSpace(4, 2, host=HostTier(4))
    first = entered(space, [1, 2, 3, 4, 5])
    compute(space, first, 5)
    space.release(first)
    other = entered(space, [9] * 6)
    space.grow(other, 6)
    published = space.publish(other, 6)
    space.unpublish(published, space.take_moves())
    space.release(other)
    for tokens in ([1, 2, 3, 4, 5], [9] * 7):
        assert space.plan_entry(request_of(space, tokens)).num_computed_tokens == 0
    assert space.host is not None
    assert (space.host.num_cached, len(space.cache)) == (0, 0)


def test_a_host_block_that_is_taken_is_not_found_and_not_handed_out() -> None:
    tier = HostTier(3)
    assert [tier.store(digest) for digest in (b"a", b"b", b"c")] == [0, 1, 2]
    tier.take([1])
    tier.check_invariants([1])
    assert (tier.find(b"b"), tier.num_held, tier.num_cached) == (None, 1, 2)
    assert [tier.store(digest) for digest in (b"d", b"e", b"f")] == [0, 2, 0]
    tier.forget_block(2)
    tier.forget_block(1)  # held: nothing is cached there
    assert [tier.find(digest) for digest in (b"d", b"e", b"f")] == [None, None, 0]
    tier.release([1])
    tier.check_invariants([])


def test_taking_host_blocks_does_not_look_at_all_of_them() -> None:
    """A sanity bound far above what it takes; a search through all of them would take seconds."""
    tier = HostTier(40_000)
    for index in range(40_000):
        tier.store(index.to_bytes(4))
    started = time.process_time()
    for block in range(500):
        tier.take([block])
        tier.forget_block(39_999 - block)
    assert time.process_time() - started < 0.3

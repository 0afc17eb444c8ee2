"""Who gives way when memory is short, and how."""

from typing import Any

import pytest

from jaxpaged.block_space import BlockSpace
from jaxpaged.host_tier import HostTier
from jaxpaged.policies import Fcfs
from jaxpaged.preemption import MAX_PREEMPTIONS, Preemption
from jaxpaged.preemption_cost import PreemptionCost
from jaxpaged.request import Request, RequestStatus
from jaxpaged.scheduler import Scheduler
from jaxpaged.step_plan import Move, MoveKind
from tests.core.pool_model import make_request, make_scheduler

SIZE = 4


def request_of(name: str, num_tokens: int, arrival: int = 0) -> Request:
    seed = 100 * int.from_bytes(name.encode())
    (request,) = make_request(name, [seed + i for i in range(num_tokens)], block_size=SIZE, max_tokens=20)
    request.arrival_index = arrival
    return request


def running(space: BlockSpace, name: str, num_tokens: int) -> Request:
    request = request_of(name, num_tokens)
    space.enter(request, space.plan_entry(request))
    space.grow(request, num_tokens)
    space.publish(request, num_tokens)
    space.unused.written(num_tokens - request.num_computed_tokens)
    request.num_computed_tokens = num_tokens
    request.status = RequestStatus.RUNNING
    return request


def cost_of(*, seconds_a_token: float, seconds_a_block: float) -> PreemptionCost:
    cost = PreemptionCost(1, min_step_tokens=1)
    cost.observe_step(1, seconds_a_token)
    cost.observe_transfer(1, seconds_a_block)
    return cost


class TheFirst(Fcfs):
    def victim(self, running: Any) -> Request:
        return running[0]


def test_the_policy_chooses_among_those_that_were_not_pushed_out_too_often() -> None:
    preemption = Preemption(BlockSpace(9, SIZE))
    first, second, third = (request_of(name, 3, arrival) for arrival, name in enumerate("abc"))
    assert preemption.victim(TheFirst(), [first, second, third]) is first
    first.num_preemptions = MAX_PREEMPTIONS
    assert preemption.victim(TheFirst(), [first, second, third]) is second
    second.num_preemptions = third.num_preemptions = MAX_PREEMPTIONS + 3
    for order in ([first, second, third], [third, first, second]):
        assert preemption.victim(TheFirst(), order) is third, "the last to come, whatever the policy says"


def test_a_policy_that_pushes_out_the_first_ends_all_the_same() -> None:
    """Each of the two would push out the other for ever."""
    scheduler = make_scheduler(num_blocks=7, block_size=SIZE, budget=64, policy=TheFirst(), caching=False)
    requests = [request_of("a", 11), request_of("b", 11)]
    for request in requests:
        request.max_tokens, request.max_total_tokens = 13, 24
        scheduler.add(request)
    for _ in range(400):
        step = scheduler.schedule()
        scheduler.update(step, [7] * len(step.rows))
    assert all(request.num_output_tokens == 13 for request in requests)
    assert max(request.num_preemptions for request in requests) <= MAX_PREEMPTIONS + 1


def test_recomputing_gives_back_all_blocks_and_keeps_all_tokens(caplog: pytest.LogCaptureFixture) -> None:
    space = BlockSpace(9, SIZE, host=HostTier(9))
    preemption, victim = Preemption(space), running(space, "v", 9)
    preemption.preempt(victim, 7, may_swap=True)
    assert (victim.status, victim.num_computed_tokens, victim.num_tokens) == (RequestStatus.PREEMPTED, 0, 9)
    assert (space.num_free, space.take_moves()) == (8, [])
    assert (victim.num_preemptions, preemption.num_preemptions, preemption.counts) == (1, 1, {"recompute": 1})
    wanted = "request v[0] preempted: 7 blocks needed, 5 free; 9 computed tokens will be computed again"
    assert wanted in caplog.text


def test_swapping_moves_every_block_and_brings_back_what_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    space = BlockSpace(6, SIZE, host=HostTier(9))
    preemption, victim = Preemption(space, "swap"), running(space, "v", 9)
    preemption.preempt(victim, 7, may_swap=True)
    assert (victim.status, victim.num_computed_tokens) == (RequestStatus.SWAPPED, 9)
    assert victim.host_tables == [[0, 1, 2]]
    assert space.take_moves() == [Move(MoveKind.SWAP_OUT, block, block - 1) for block in (1, 2, 3)]
    assert (space.num_free, preemption.counts) == (5, {"swap": 1})
    assert "9 computed tokens are swapped out to the host" in caplog.text
    space.check_invariants([victim])

    other = running(space, "o", 14)  # takes all but the first block, which lasts the longest
    assert other.table.ids == [4, 5, 3, 2]
    space.release(other)
    space.take_moves()
    entry = space.plan_entry(victim)
    assert (entry.num_computed_tokens, entry.tables) == (9, [[1, -2, -3]]), "one is still there"
    assert space.blocks_to_enter(victim, entry, 10) == 3
    space.enter(victim, entry)
    assert victim.host_tables is None
    loads = [move for move in space.take_moves() if move.kind is MoveKind.SWAP_IN]
    assert loads == [
        Move(MoveKind.SWAP_IN, 1, victim.table.ids[1]),
        Move(MoveKind.SWAP_IN, 2, victim.table.ids[2]),
    ]
    assert space.host is not None
    assert space.host.num_held == 0
    space.check_invariants([victim])


def test_without_room_on_the_host_a_request_is_computed_again() -> None:
    for host in (None, HostTier(0), HostTier(2)):
        space = BlockSpace(9, SIZE, host=host)
        preemption, victim = Preemption(space, "swap"), running(space, "v", 9)
        preemption.preempt(victim, 1, may_swap=True)
        assert (victim.status, preemption.counts) == (RequestStatus.PREEMPTED, {"recompute": 1})
        assert (victim.host_tables, space.take_moves(), space.num_free) == (None, [], 8)


def test_who_may_not_swap_does_not() -> None:
    space = BlockSpace(9, SIZE, host=HostTier(9))
    preemption, victim = Preemption(space, "swap"), running(space, "v", 9)
    preemption.preempt(victim, 1, may_swap=False)
    assert preemption.counts == {"recompute": 1}


@pytest.mark.parametrize(
    ("cost", "wanted"),
    [
        (cost_of(seconds_a_token=1.0, seconds_a_block=2.9), "swap"),  # 9 tokens against 3 blocks
        (cost_of(seconds_a_token=1.0, seconds_a_block=3.1), "recompute"),
        (None, "recompute"),
    ],
)
def test_auto_does_what_is_cheaper(cost: PreemptionCost | None, wanted: str) -> None:
    space = BlockSpace(9, SIZE, host=HostTier(9))
    preemption, victim = Preemption(space, "auto", cost), running(space, "v", 9)
    preemption.preempt(victim, 1, may_swap=True)
    assert preemption.counts == {wanted: 1}


def test_a_prefix_that_swapping_pushes_off_the_host_is_gone_but_not_what_is_held() -> None:
    tier = HostTier(3)
    space = BlockSpace(9, SIZE, host=tier)
    assert tier.store(b"prefix") == 0
    preemption = Preemption(space, "swap")
    first, second = running(space, "a", 9), running(space, "b", 9)
    preemption.preempt(first, 1, may_swap=True)
    preemption.preempt(second, 1, may_swap=True)
    assert [first.status, second.status] == [RequestStatus.SWAPPED, RequestStatus.PREEMPTED]
    assert (tier.num_held, tier.find(b"prefix")) == (3, None)
    space.release(first)
    assert (tier.num_held, first.host_tables) == (0, None)


def short_of_memory(mode: Any) -> Scheduler:
    scheduler = make_scheduler(num_blocks=7, block_size=SIZE, budget=64, num_host_blocks=8)
    scheduler.preemption = Preemption(scheduler.space, mode)
    for name in "ab":
        scheduler.add(request_of(name, 11))
    return scheduler


@pytest.mark.parametrize(("mode", "count"), [("swap", 1), ("recompute", 9)])
def test_a_swapped_request_goes_on_where_it_was(mode: Any, count: int) -> None:
    scheduler = short_of_memory(mode)
    first, second = list(scheduler.waiting)
    for _ in range(3):
        step = scheduler.schedule()
        scheduler.update(step, [7] * len(step.rows))
    assert step.preempted == [second]
    second.block_hashes.clear()  # so that nothing is found in the pool
    scheduler.space.forget_everything()
    scheduler.finish(first, RequestStatus.FINISHED_ABORTED)
    step = scheduler.schedule()
    scheduler.check_invariants()
    assert step.rows == [(second, 1 if mode == "swap" else 13)]
    kinds = [move.kind for move in step.moves]
    assert kinds == ([MoveKind.SWAP_IN] * 3 if mode == "swap" else [])


def test_who_runs_alone_takes_the_blocks_of_forks_that_wait() -> None:
    scheduler = make_scheduler(num_blocks=7, block_size=SIZE, budget=64, max_num_seqs=1)
    requests = make_request("a", list(range(10)), block_size=SIZE, max_tokens=15, n=2)
    scheduler.add(requests[0])
    step = scheduler.schedule()
    scheduler.update(step, [7])
    assert requests[1].holds_blocks
    while not requests[0].status.is_finished:
        step = scheduler.schedule()
        scheduler.update(step, [7] * len(step.rows))
        scheduler.check_invariants()
    assert (scheduler.num_preemptions, requests[1].holds_blocks) == (0, False)


def test_nobody_is_swapped_out_who_would_be_alone() -> None:
    """It would come back to the same blocks; and there is nothing else that could make room."""
    scheduler = short_of_memory("swap")
    first, second = list(scheduler.waiting)
    scheduler.finish(second, RequestStatus.FINISHED_ABORTED)
    scheduler.update(scheduler.schedule(), [7])
    held = [scheduler.space.allocator.allocate() for _ in range(scheduler.space.num_free)]
    for _ in range(2):
        step = scheduler.schedule()
        scheduler.update(step, [7] * len(step.rows))
    assert (first.status, step.preempted) == (RequestStatus.PREEMPTED, [first])
    scheduler.space.allocator.release(held)

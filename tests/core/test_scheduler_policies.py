"""Policies, tenants and deadlines at work in the scheduler: who runs, in which order, with what share."""

from collections import Counter
from typing import Any

import pytest

from jaxpaged.memory_monitor import MemoryMonitor
from jaxpaged.policies import LongestPrefixMatch, Priority, SchedulingPolicy, ShortestPromptFirst
from jaxpaged.request import Request, RequestStatus
from jaxpaged.scheduler import ScheduledStep, Scheduler
from tests.core.pool_model import make_request, make_scheduler

SIZE = 4


def scheduler_with(policy: SchedulingPolicy | None, **options: Any) -> Scheduler:
    sizes = {"num_blocks": 100, "block_size": SIZE, "budget": 64, "max_num_seqs": 1, **options}
    return make_scheduler(policy=policy, **sizes)


def add(
    scheduler: Scheduler,
    name: str,
    prompt: list[int] | int = 3,
    *,
    max_tokens: int = 1,
    at: float = 0.0,
    **fields: Any,
) -> Request:
    """A request with these prompt tokens, or with this many of its own, that arrived at some time."""
    if isinstance(prompt, int):
        prompt = [int.from_bytes(name.encode()) * 1000 + i for i in range(prompt)]
    (request,) = make_request(name, prompt, block_size=SIZE, max_tokens=max_tokens, **fields)
    request.arrival_time = at
    scheduler.add(request)
    return request


def run(scheduler: Scheduler) -> ScheduledStep:
    step = scheduler.schedule()
    scheduler.update(step, [7] * len(step.rows))
    scheduler.check_invariants()
    return step


def order(scheduler: Scheduler) -> str:
    """The requests in the order in which they are first scheduled."""
    seen: dict[str, None] = {}
    while scheduler.has_unfinished:
        seen.update(dict.fromkeys(request.request_id for request, _ in run(scheduler).rows))
    return "".join(seen)


def test_the_urgent_go_first_and_the_least_urgent_gives_way() -> None:
    scheduler = scheduler_with(Priority())
    for name, priority in (("a", 2), ("b", 0), ("c", 1), ("d", 0)):
        add(scheduler, name, priority=priority)
    assert order(scheduler) == "bdca"

    scheduler = scheduler_with(Priority(), num_blocks=7, max_num_seqs=4)
    unimportant = add(scheduler, "u", 11, max_tokens=8, priority=5)
    run(scheduler)
    urgent = add(scheduler, "v", 11, max_tokens=8, priority=1)
    while not unimportant.num_preemptions:
        run(scheduler)
    assert urgent.num_preemptions == 0
    while not urgent.status.is_finished:
        run(scheduler)
    assert (urgent.num_preemptions, unimportant.num_output_tokens < 8) == (0, True)
    assert order(scheduler) == "u"


@pytest.mark.parametrize(("aging_seconds", "wanted"), [(None, "bca"), (10.0, "bca"), (5.0, "bac")])
def test_who_has_waited_long_enough_becomes_urgent(aging_seconds: float | None, wanted: str) -> None:
    """Two levels behind, ``a`` is passed by those that come within two times ``aging_seconds``."""
    scheduler = scheduler_with(Priority(aging_seconds=aging_seconds))
    for name, priority, at in (("a", 2, 0.0), ("b", 0, 9.0), ("c", 0, 11.0)):
        add(scheduler, name, priority=priority, at=at)
    assert order(scheduler) == wanted


def test_the_shortest_prompt_goes_first_and_the_longest_gives_way() -> None:
    scheduler = scheduler_with(ShortestPromptFirst(aging_tokens_per_second=2.0))
    for name, length, at in (("a", 20, 0.0), ("b", 5, 1.0), ("c", 10, 2.0), ("d", 9, 6.0)):
        add(scheduler, name, length, at=at)
    assert order(scheduler) == "bcad", "by 20, 5 + 2, 10 + 4 and 9 + 12"

    scheduler = scheduler_with(ShortestPromptFirst(), num_blocks=7, max_num_seqs=4)
    long, short = add(scheduler, "l", 12, max_tokens=9), add(scheduler, "s", 7, max_tokens=9)
    while not short.status.is_finished:
        run(scheduler)
    assert (short.num_preemptions, long.num_preemptions) == (0, 1)


def test_who_finds_most_of_its_prefix_goes_first_but_not_for_ever() -> None:
    scheduler = scheduler_with(LongestPrefixMatch(window=3, max_skips=2))
    warm = list(range(17))
    add(scheduler, "w", warm)
    run(scheduler)
    add(scheduler, "a", 6)
    add(scheduler, "b", [*warm[:8], 99])
    for name in "cdef":
        add(scheduler, name, warm)
    # Of a, b and c it is c, then of a, b and d it is d; a has been passed over twice then.
    assert order(scheduler) == "cdaefb"


def test_a_waiting_prefix_is_found_even_when_only_the_host_has_it() -> None:
    scheduler = scheduler_with(LongestPrefixMatch(), num_blocks=6, num_host_blocks=20)
    warm = list(range(17))
    add(scheduler, "w", warm)
    run(scheduler)
    add(scheduler, "x", 20)
    run(scheduler)
    add(scheduler, "a", 17)
    add(scheduler, "b", warm)
    step = run(scheduler)
    assert [(request.request_id, count) for request, count in step.rows] == [("b", 1)]


def tokens_by_tenant(scheduler: Scheduler, num_steps: int) -> Counter[str]:
    given: Counter[str] = Counter()
    for _ in range(num_steps):
        step = scheduler.schedule()
        for request, count in step.rows:
            given[request.tenant] += count
        scheduler.update(step, [7] * len(step.rows))
    return given


@pytest.mark.parametrize("weights", [{}, {"a": 3.0}, {"a": 3.0, "b": 0.5}])
def test_tenants_that_keep_the_queue_filled_get_their_shares(weights: dict[str, float]) -> None:
    scheduler = scheduler_with(None, max_num_seqs=4, budget=16, num_blocks=400, tenant_weights=weights)
    for index in range(150):
        # The one with the larger share asks for less at a time, and is no more than one of three names.
        for tenant, length in (("a", 3), ("b", 9), ("c", 6)):
            add(scheduler, f"{tenant}{index}", length, max_tokens=4, tenant=tenant)
    tokens_by_tenant(scheduler, 20)
    given = tokens_by_tenant(scheduler, 120)
    assert all(any(request.tenant == tenant for request in scheduler.waiting) for tenant in "abc"), (
        "under load"
    )
    whole = sum(weights.get(tenant, 1.0) for tenant in "abc")
    for tenant in "abc":
        share = given[tenant] / given.total()
        assert share == pytest.approx(weights.get(tenant, 1.0) / whole, rel=0.12), (
            f"{tenant} of {dict(given)}"
        )


def test_a_newcomers_first_request_does_not_wait_behind_anothers_hundred() -> None:
    scheduler = scheduler_with(None)
    for index in range(100):
        add(scheduler, f"a{index}", tenant="a")
    run(scheduler)
    add(scheduler, "b", tenant="b")
    started = [request.request_id for _ in range(3) for request, _ in run(scheduler).rows]
    assert "b" in started


def test_a_request_that_waits_too_long_ends_and_leaves_nothing() -> None:
    scheduler = scheduler_with(Priority(aging_seconds=None))
    low = add(scheduler, "low", priority=1, queue_deadline=5.0)
    begun = add(scheduler, "begun", max_tokens=30, queue_deadline=4.0, deadline=8.0)
    for index in range(5):
        add(scheduler, str(index))
        run(scheduler)
    assert scheduler.deadlines.expired(4.5) == []
    assert scheduler.deadlines.expired(5.0) == [low]
    scheduler.finish(low, RequestStatus.FINISHED_TIMEOUT)
    scheduler.check_invariants()
    assert scheduler.deadlines.expired(8.0) == [begun]
    scheduler.finish(begun, RequestStatus.FINISHED_TIMEOUT)
    assert order(scheduler) == "01234"
    assert scheduler.space.num_free == 99


def test_nearly_full_memory_takes_no_newcomers_and_then_lets_pins_go() -> None:
    monitor = MemoryMonitor(0.5, 0.7, hysteresis=0.1)
    scheduler = scheduler_with(None, num_blocks=11, max_num_seqs=4, monitor=monitor)
    first = add(scheduler, "a", 17, max_tokens=20)
    run(scheduler)
    scheduler.space.pins.add("p", scheduler.space.cache._block_of, None)
    second = add(scheduler, "b", 3, max_tokens=20)
    for num_live in (5, 5, 5, 6, 6, 6, 6, 7):
        assert [request for request, _ in run(scheduler).rows] == [first], (
            "five of ten blocks are half of them"
        )
        assert ("p" in scheduler.space.pins, scheduler.space.allocator.num_live) == (True, num_live)
    run(scheduler)
    assert "p" not in scheduler.space.pins, "seven are critical"
    while not first.status.is_finished:
        assert [request for request, _ in run(scheduler).rows] == [first]
    assert [request for request, _ in run(scheduler).rows] == [second]


def test_critical_memory_halves_a_step_but_nobodys_decoding_stops() -> None:
    monitor = MemoryMonitor(0.1, 0.2, hysteresis=0.05)
    scheduler = scheduler_with(None, max_num_seqs=4, budget=8, num_blocks=40, monitor=monitor)
    requests = [
        add(scheduler, name, length, max_tokens=9) for name, length in (("a", 3), ("b", 3), ("c", 30))
    ]
    assert [count for _, count in run(scheduler).rows] == [3, 3, 2]
    assert [count for _, count in run(scheduler).rows] == [1, 1, 6]
    while scheduler.space.allocator.num_live < 8:
        run(scheduler)
    assert [count for _, count in run(scheduler).rows] == [1, 1, 2], "half of eight"
    assert {request.status for request in requests} == {RequestStatus.RUNNING}

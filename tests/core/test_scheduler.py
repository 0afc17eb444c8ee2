"""What the scheduler decides, told in small stories; ``test_scheduler_machine`` has the invariants."""

import logging
import time

import pytest

from jaxpaged.preemption import Preemption
from jaxpaged.request import Request, RequestStatus
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.scheduler import ScheduledStep, Scheduler
from tests.core.pool_model import make_request, make_scheduler


def add(
    scheduler: Scheduler, name: str, prompt: list[int] | int, *, max_tokens: int = 4, n: int = 1
) -> list[Request]:
    """A request with these prompt tokens, or with this many of its own."""
    if isinstance(prompt, int):
        prompt = [int.from_bytes(name.encode()) * 1000 + i for i in range(prompt)]
    block_size = scheduler.space.block_size
    requests = make_request(name, prompt, block_size=block_size, max_tokens=max_tokens, n=n)
    scheduler.add(requests[0])
    return requests


def run(scheduler: Scheduler, token: int = 7) -> ScheduledStep:
    step = scheduler.schedule()
    scheduler.update(step, [token] * len(step.rows))
    scheduler.check_invariants()
    return step


def planned(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(request.request_id, request.index, count) for request, count in step.rows]


def test_running_before_waiting_in_order_of_arrival() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=10)
    add(scheduler, "a", 4)
    add(scheduler, "b", 9)
    assert planned(run(scheduler)) == [("a", 0, 4), ("b", 0, 6)]
    add(scheduler, "c", 3)
    assert planned(run(scheduler)) == [("a", 0, 1), ("b", 0, 3), ("c", 0, 3)]


def test_a_long_prompt_goes_in_chunks_and_samples_once() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=8)
    (request,) = add(scheduler, "a", 20, max_tokens=1)
    assert [planned(run(scheduler)) for _ in range(3)] == [[("a", 0, 8)], [("a", 0, 8)], [("a", 0, 4)]]
    assert request.output_token_ids == [7]
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert scheduler.space.num_free == 39


def test_no_more_than_max_num_seqs() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, max_num_seqs=2, budget=32)
    for name in "abc":
        add(scheduler, name, 3, max_tokens=2)
    assert planned(run(scheduler)) == [("a", 0, 3), ("b", 0, 3)]
    assert planned(run(scheduler)) == [("a", 0, 1), ("b", 0, 1)]
    assert planned(run(scheduler)) == [("c", 0, 3)]


def test_equal_prompts_of_one_step_share_their_blocks() -> None:
    """The first publishes blocks that the same step fills, so the second need not compute them."""
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64)
    prompt = list(range(18))
    (first,), (second,) = add(scheduler, "a", prompt), add(scheduler, "b", prompt)
    assert planned(run(scheduler)) == [("a", 0, 18), ("b", 0, 2)]
    assert first.table.ids[:4] == second.table.ids[:4]
    assert first.table.ids[4] != second.table.ids[4]
    assert second.num_cached_tokens == 16


def test_forks_compute_only_the_last_token_of_their_prompt() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64)
    requests = add(scheduler, "a", 10, n=3)
    assert planned(run(scheduler)) == [("a", 0, 10)]
    step = scheduler.schedule()
    assert planned(step) == [("a", 0, 1), ("a", 1, 1), ("a", 2, 1)]
    assert len(step.copies) == 2, "the last of three holders writes in place"
    assert [r.num_computed_tokens for r in requests] == [10, 9, 9]
    scheduler.update(step, [1, 2, 3])
    assert len({r.table.ids[2] for r in requests}) == 3
    assert all(r.table.ids[:2] == requests[0].table.ids[:2] for r in requests)
    assert scheduler.space.num_free == 39 - 5


def test_the_last_arrival_gives_way_and_finds_its_blocks_again(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = make_scheduler(num_blocks=7, block_size=4, budget=64)
    (first,) = add(scheduler, "a", 11, max_tokens=8)
    (second,) = add(scheduler, "b", 11, max_tokens=3)
    run(scheduler)
    run(scheduler)
    with caplog.at_level(logging.WARNING, "jaxpaged"):
        step = run(scheduler)
    assert step.preempted == [second]
    assert second.status is RequestStatus.PREEMPTED
    assert second.output_token_ids == [7, 7], "no token is lost"
    assert "request b[0] preempted" in caplog.text
    assert scheduler.num_preemptions == second.num_preemptions == 1
    while not first.status.is_finished:
        run(scheduler)
    run(scheduler)
    assert second.output_token_ids == [7, 7, 7]
    assert second.num_cached_tokens > 0, "its blocks were still there"


def test_a_newcomer_leaves_the_watermark_free_unless_alone() -> None:
    scheduler = make_scheduler(num_blocks=10, block_size=4, budget=64, watermark=0.3)
    add(scheduler, "a", 12)
    add(scheduler, "b", 16)
    assert planned(run(scheduler)) == [("a", 0, 12)], "b would leave fewer than three blocks"
    alone = make_scheduler(num_blocks=10, block_size=4, budget=64, watermark=0.3)
    add(alone, "a", 36, max_tokens=1)
    assert planned(run(alone)) == [("a", 0, 36)]


def test_a_heir_computes_the_prompt_when_the_first_completion_ends_early() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=4)
    first, second, third = add(scheduler, "a", 10, n=3)
    run(scheduler)
    scheduler.finish(first, RequestStatus.FINISHED_ABORTED)
    scheduler.finish(third, RequestStatus.FINISHED_ABORTED)
    scheduler.check_invariants()
    while scheduler.has_unfinished:
        run(scheduler)
    assert [len(r.output_token_ids) for r in (first, second, third)] == [0, 4, 0]
    assert second.status is RequestStatus.FINISHED_LENGTH


def test_a_failed_step_publishes_nothing() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64)
    prompt = list(range(12))
    (first,) = add(scheduler, "a", prompt)
    assert scheduler.fail(scheduler.schedule()) == [first]
    assert first.status is RequestStatus.FINISHED_ERROR
    (second,) = add(scheduler, "b", prompt)
    assert planned(run(scheduler)) == [("b", 0, 12)]
    assert second.num_cached_tokens == 0


def test_a_step_is_planned_before_the_tokens_of_the_last_one_are_known() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64)
    (request,) = add(scheduler, "a", 3, max_tokens=3)
    first = scheduler.schedule()
    scheduler.advance(first)
    assert (request.num_computed_tokens, request.num_pending) == (3, 1)
    second = scheduler.schedule()
    assert planned(second) == [("a", 0, 1)], "the token that only the device knows"
    assert second.published == [], "a block is found by its tokens, of which the host lacks the last"
    scheduler.advance(second)
    assert scheduler.collect(first, [5]) == [request]
    third = scheduler.schedule()
    assert third.published == request.table.ids[:1]
    scheduler.advance(third)
    scheduler.collect(second, [6])
    assert planned(scheduler.schedule()) == [], "its third and last token is on the way"
    scheduler.collect(third, [7])
    assert (request.output_token_ids, request.status) == ([5, 6, 7], RequestStatus.FINISHED_LENGTH)
    scheduler.check_invariants()


def test_a_token_that_comes_after_the_end_is_dropped() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64)
    (request,) = add(scheduler, "a", 3)
    steps = [scheduler.schedule()]
    scheduler.advance(steps[0])
    steps.append(scheduler.schedule())
    scheduler.advance(steps[1])
    scheduler.collect(steps[0], [5])
    scheduler.finish(request, RequestStatus.FINISHED_STOPPED)
    assert scheduler.collect(steps[1], [6]) == []
    assert request.output_token_ids == [5]
    assert scheduler.space.num_free == 39


def test_who_was_pushed_out_waits_for_its_token_before_it_comes_back() -> None:
    """Another row would not know the token, and its own may have another owner by then."""
    scheduler = make_scheduler(num_blocks=7, block_size=4, budget=64)
    (first,), (second,) = add(scheduler, "a", 11, max_tokens=8), add(scheduler, "b", 11, max_tokens=8)
    run(scheduler)
    ahead = scheduler.schedule()
    scheduler.advance(ahead)
    step = scheduler.schedule()
    scheduler.advance(step)
    assert step.preempted == [second]
    assert second.num_pending == 1
    scheduler.finish(first, RequestStatus.FINISHED_ABORTED)
    assert planned(scheduler.schedule()) == []
    scheduler.collect(ahead, [5, 6])
    assert second.output_token_ids == [7, 6]
    assert planned(scheduler.schedule()) == [("b", 0, 5)], "eight were found again"


def test_a_request_that_needs_its_tokens_says_so_while_it_runs() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64)
    (request,) = add(scheduler, "a", 3, max_tokens=2)
    request.needs_tokens_on_host = True
    assert not scheduler.needs_tokens
    run(scheduler)
    assert scheduler.needs_tokens
    run(scheduler)
    assert request.status.is_finished
    assert not scheduler.needs_tokens


def num_steps_of(scheduler: Scheduler) -> int:
    step = scheduler.schedule()
    scheduler.advance(step)
    for _ in range(step.num_steps):
        scheduler.collect(step, [7] * len(step.rows))
    scheduler.check_invariants()
    return step.num_steps


def test_several_steps_at_a_time_when_nothing_on_the_host_has_a_say_in_between() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64, max_num_seqs=2, num_scheduler_steps=3)
    (first,) = add(scheduler, "a", 3, max_tokens=12)
    assert [num_steps_of(scheduler) for _ in range(2)] == [1, 3], "not with a prompt"
    assert first.num_output_tokens == 4
    (second,) = add(scheduler, "b", 3, max_tokens=9)
    (third,) = add(scheduler, "c", 3, max_tokens=9)
    assert [num_steps_of(scheduler) for _ in range(2)] == [1, 1], "somebody waits"
    scheduler.finish(third, RequestStatus.FINISHED_ABORTED)
    second.needs_single_steps = True
    assert num_steps_of(scheduler) == 1
    second.needs_single_steps = False
    assert num_steps_of(scheduler) == 3
    assert (first.num_output_tokens, second.num_output_tokens) == (10, 6)
    assert num_steps_of(scheduler) == 1, "a has two tokens left"


def test_not_several_steps_while_completions_wait_for_the_prompt() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64, num_scheduler_steps=3)
    add(scheduler, "a", 1, max_tokens=12, n=2)
    assert [num_steps_of(scheduler) for _ in range(2)] == [1, 3]


def test_not_several_steps_when_their_blocks_are_not_free() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=2, budget=64, num_scheduler_steps=3)
    (request,) = add(scheduler, "a", 1, max_tokens=4)
    assert [num_steps_of(scheduler) for _ in range(2)] == [3, 1]
    assert request.status.is_finished
    scheduler = make_scheduler(num_blocks=4, block_size=2, budget=64, num_scheduler_steps=3)
    (other,) = make_request("other", [1], block_size=2)
    scheduler.space.enter(other, scheduler.space.plan_entry(other))
    scheduler.space.grow(other, 3)
    add(scheduler, "a", 1, max_tokens=4)
    assert scheduler.schedule().num_steps == 1


def test_a_fork_that_wants_its_prompts_log_probabilities_computes_all_of_it() -> None:
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64)
    (parent,) = add(scheduler, "a", 10)
    run(scheduler)
    for wants in (False, True):
        params = SamplingParams(prompt_logprobs=0 if wants else None)
        (child,) = make_request(str(wants), parent.token_ids, block_size=4, params=params)
        scheduler.fork(parent, child)
        assert child.num_computed_tokens == (0 if wants else 10)
    assert planned(run(scheduler)) == [("a", 0, 1), ("False", 0, 1), ("True", 0, 11)]


def test_after_a_restart_nobody_counts_as_swapped_out() -> None:
    scheduler = make_scheduler(num_blocks=7, block_size=4, budget=64, num_host_blocks=10)
    scheduler.preemption = Preemption(scheduler.space, "swap")
    add(scheduler, "a", 11, max_tokens=8)
    (second,) = add(scheduler, "b", 11, max_tokens=3)
    for _ in range(3):
        run(scheduler)
    assert second.status is RequestStatus.SWAPPED
    scheduler.restart()
    scheduler.check_invariants()
    assert second.status is RequestStatus.PREEMPTED
    assert planned(run(scheduler)) == [("a", 0, 14)]


def test_the_last_block_that_a_request_fills_is_found_by_the_next() -> None:
    """It is published at the end, for there is no next token whose step would do it."""
    scheduler = make_scheduler(num_blocks=40, block_size=4, budget=64)
    (first,) = add(scheduler, "a", 6, max_tokens=3)
    while not first.status.is_finished:
        run(scheduler)
    (second,) = add(scheduler, "b", [*first.token_ids, 1, 2])
    run(scheduler)
    assert second.num_cached_tokens == 8


def test_a_step_of_many_rows_is_planned_quickly() -> None:
    """A sanity bound far above what it takes (benchmarks measure it): nothing quadratic, nothing by position."""
    scheduler = make_scheduler(num_blocks=20_000, block_size=16, max_num_seqs=64, budget=4096)
    for i in range(64):
        add(scheduler, str(i), 60, max_tokens=400)
    run(scheduler)
    started = time.process_time()
    for _ in range(200):
        scheduler.update(scheduler.schedule(), [7] * 64)
    assert (time.process_time() - started) / 200 < 5e-3

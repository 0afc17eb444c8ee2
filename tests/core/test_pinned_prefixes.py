"""Prefixes that stay: what a pin holds, from when on, and when it lets go."""

import pytest

from jaxpaged.prefix_cache import block_hashes, group_key
from jaxpaged.request import Request, RequestStatus
from jaxpaged.scheduler import Scheduler
from tests.core.pool_model import make_request, make_scheduler

SIZE = 4


def keys_of(tokens: list[int], num_groups: int = 1) -> list[bytes]:
    hashes = block_hashes(tokens, SIZE)
    return [group_key(digest, group) for digest in hashes for group in range(num_groups)]


def prompt(seed: int, length: int = 9) -> list[int]:
    return [100 * seed + i for i in range(length)]


def add(scheduler: Scheduler, name: str, tokens: list[int], max_tokens: int = 1) -> Request:
    (request,) = make_request(
        name, tokens, block_size=SIZE, max_tokens=max_tokens, num_tables=len(scheduler.space.windows)
    )
    scheduler.add(request)
    return request


def run(scheduler: Scheduler) -> None:
    step = scheduler.schedule()
    scheduler.update(step, [7] * len(step.rows))
    scheduler.check_invariants()


def serve(scheduler: Scheduler, tokens: list[int]) -> int:
    """Runs a request to its end; how many tokens of it were cached."""
    request = add(scheduler, "served", tokens)
    while not request.status.is_finished:
        run(scheduler)
    return request.num_cached_tokens


def test_a_pin_holds_what_is_there_and_survives_everybody_else() -> None:
    scheduler = make_scheduler(num_blocks=9, block_size=SIZE, budget=64)
    serve(scheduler, prompt(1))
    assert scheduler.space.pins.add("p", keys_of(prompt(1)), None) == 2
    for other in range(2, 9):
        serve(scheduler, prompt(other, 20))
    assert serve(scheduler, prompt(1)) == 8
    assert scheduler.space.pins.remove("p")
    for other in range(2, 9):
        serve(scheduler, prompt(other, 20))
    assert serve(scheduler, prompt(1)) == 0, "it was the pin"


def test_a_pin_takes_hold_of_blocks_as_they_are_computed() -> None:
    scheduler = make_scheduler(num_blocks=20, block_size=SIZE, budget=5)
    pins = scheduler.space.pins
    assert pins.add("p", keys_of(prompt(1)), None) == 0
    add(scheduler, "r", prompt(1), max_tokens=5)
    assert len(pins.blocks) == 0
    run(scheduler)
    assert len(pins.blocks) == 1, "five tokens, one block of four"
    run(scheduler)
    assert len(pins.blocks) == 2
    assert pins.num_keys == 2


def test_in_a_model_with_windows_a_pin_holds_the_blocks_of_every_group() -> None:
    scheduler = make_scheduler(num_blocks=30, block_size=SIZE, budget=64, windows=(None, 6))
    pins = scheduler.space.pins
    assert pins.add("p", keys_of(prompt(1, 17), num_groups=2), None) == 0
    serve(scheduler, prompt(1, 17))
    assert len(pins.blocks) == 8
    for other in range(2, 9):
        serve(scheduler, prompt(other, 30))
    assert serve(scheduler, prompt(1, 17)) == 16


def test_two_pins_may_name_the_same_blocks() -> None:
    scheduler = make_scheduler(num_blocks=20, block_size=SIZE, budget=64)
    pins = scheduler.space.pins
    pins.add("before", keys_of(prompt(1)), None)
    serve(scheduler, prompt(1, 5) + prompt(2, 5))
    serve(scheduler, prompt(1))
    assert pins.add("after", keys_of(prompt(1)), None) == 2
    assert pins.num_keys == 2, "counted once"
    assert set(pins.holders().values()) == {2}
    assert pins.remove("before")
    assert len(pins.blocks) == 2
    assert scheduler.space.num_free == 17
    assert pins.remove("after")
    assert not pins.remove("after")
    assert scheduler.space.num_free == 19


def test_a_pin_set_again_names_other_blocks_and_begins_its_time_anew() -> None:
    scheduler = make_scheduler(num_blocks=20, block_size=SIZE, budget=64)
    pins = scheduler.space.pins
    serve(scheduler, prompt(1))
    serve(scheduler, prompt(2, 13))
    pins.add("p", keys_of(prompt(1)), 5.0)
    assert pins.add("p", keys_of(prompt(2, 13)), 9.0) == 3
    assert (len(pins), len(pins.blocks)) == (1, 3)
    assert pins.expire(8.0) == []
    assert pins.expire(9.0) == ["p"], "at the end of its time, not after it"
    assert (len(pins), pins.num_keys, scheduler.space.num_free) == (0, 0, 19)


def test_the_scheduler_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr("jaxpaged.scheduler.time.monotonic", lambda: now)
    scheduler = make_scheduler(num_blocks=20, block_size=SIZE, budget=64)
    serve(scheduler, prompt(1))
    scheduler.space.pins.add("p", keys_of(prompt(1)), 12.0)
    scheduler.schedule()
    assert "p" in scheduler.space.pins
    now = 12.0
    scheduler.schedule()
    assert "p" not in scheduler.space.pins
    assert scheduler.space.num_free == 19


def test_the_pin_that_ends_first_gives_way_first_and_only_pins_that_hold_something() -> None:
    scheduler = make_scheduler(num_blocks=30, block_size=SIZE, budget=64)
    pins = scheduler.space.pins
    wanted = {"good": None, "late": 9e15, "soon": 5e15}
    for seed in range(3):
        serve(scheduler, prompt(seed))
    for seed, (name, expires) in enumerate(wanted.items()):
        pins.add(name, keys_of(prompt(seed)), expires)
    pins.add("empty", keys_of(prompt(4)), 1.0)
    left = []
    while pins.give_way():
        left.append([name for name in wanted if name in pins])
    assert left == [["good", "late"], ["good"], []]
    assert "empty" in pins


def test_pins_give_way_to_a_request_that_runs_alone_and_only_to_that() -> None:
    scheduler = make_scheduler(num_blocks=9, block_size=SIZE, budget=64)
    pins = scheduler.space.pins
    serve(scheduler, prompt(1, 17))
    pins.add("p", keys_of(prompt(1, 17)), None)
    first = add(scheduler, "first", prompt(2, 7), max_tokens=3)
    waiting = add(scheduler, "waiting", prompt(3, 20), max_tokens=1)
    run(scheduler)
    run(scheduler)
    assert first.status is RequestStatus.RUNNING
    assert waiting.status is RequestStatus.WAITING
    assert len(pins.blocks) == 4, "somebody runs, so the pin stays"
    run(scheduler)
    assert first.status.is_finished
    run(scheduler)
    assert waiting.status.is_finished
    assert "p" not in pins

    pins.add("q", keys_of(prompt(4)), None)
    serve(scheduler, prompt(4))
    long = add(scheduler, "long", prompt(5, 8), max_tokens=24)
    while not long.status.is_finished:
        run(scheduler)
    assert "q" not in pins, "growing alone it needed all blocks"
    assert long.num_preemptions == 0


def test_what_a_failed_step_was_to_write_is_not_pinned() -> None:
    scheduler = make_scheduler(num_blocks=20, block_size=SIZE, budget=64)
    pins = scheduler.space.pins
    pins.add("p", keys_of(prompt(1)), None)
    add(scheduler, "r", prompt(1))
    step = scheduler.schedule()
    assert len(pins.blocks) == 2
    scheduler.fail(step)
    scheduler.check_invariants()
    assert len(pins.blocks) == 0
    assert scheduler.space.num_free == 19
    serve(scheduler, prompt(1))
    assert len(pins.blocks) == 2, "the pin stays and takes what comes next"


def test_after_a_restart_pins_take_hold_anew() -> None:
    scheduler = make_scheduler(num_blocks=20, block_size=SIZE, budget=64)
    pins = scheduler.space.pins
    serve(scheduler, prompt(1))
    pins.add("p", keys_of(prompt(1)), None)
    scheduler.restart()
    scheduler.check_invariants()
    assert (len(pins.blocks), scheduler.space.num_free) == (0, 19)
    assert serve(scheduler, prompt(1)) == 0
    assert len(pins.blocks) == 2


def test_all_pins_together_are_bounded() -> None:
    pins = make_scheduler(num_blocks=20, block_size=SIZE).space.pins
    pins.add("a", keys_of(prompt(1, 16)), None)
    assert pins.has_room("b", keys_of(prompt(2, 16)), 8)
    assert not pins.has_room("b", keys_of(prompt(2, 16)), 7)
    assert pins.has_room("b", keys_of(prompt(1, 12)), 4), "named twice, held once"
    assert pins.has_room("a", keys_of(prompt(2, 16)), 4), "it takes the place of the one of its name"


def test_the_end_of_a_prefix_is_reused_before_its_beginning() -> None:
    """A prefix is found from its first block; and the order does not depend on how Python hashes the keys."""
    scheduler = make_scheduler(num_blocks=60, block_size=SIZE, budget=64)
    serve(scheduler, prompt(1, 41))
    pins, allocator = scheduler.space.pins, scheduler.space.allocator
    for let_go in (pins.release_blocks, lambda: pins.remove("p")):
        pins.add("p", keys_of(prompt(1, 41)), None)
        blocks = [scheduler.space.cache.get(key) for key in keys_of(prompt(1, 41))]
        let_go()
        order = list(allocator._free)
        assert [order.index(block) for block in blocks if block] == list(range(58, 48, -1))

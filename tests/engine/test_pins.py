"""Prefixes that are kept whatever else needs memory, and when they are not."""

from typing import Any

import pytest

from jaxpaged import Engine
from jaxpaged.errors import InvalidRequestError
from tests.engine.family import FULL, PARAMS, PROMPTS, Clock, core_of, sibling
from tests.engine.test_bad_input import Call, check_refused
from tests.engine.test_failures import break_step, fail_and_lose_the_state
from tests.engine.tiny import GREEDY, dense_greedy, drain, prompt_of, tokens_of

SYSTEM = prompt_of(30)  # seven full blocks
QUESTION = [*SYSTEM, 17, 18]


@pytest.fixture
def engine(either: Engine) -> Engine:
    return either


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def ask(engine: Engine) -> int:
    """How many tokens of the question are found in the cache; the answer is checked."""
    (output,) = engine.generate(QUESTION, GREEDY)
    assert output.outputs[0].token_ids == dense_greedy(QUESTION, 16)
    engine.check_invariants()
    return output.num_cached_tokens


def push_out(engine: Engine) -> None:
    """Others take all the memory there is, one after the other."""
    for seed in range(4):
        prompt = prompt_of(40, seed)
        assert tokens_of(engine.generate(prompt, GREEDY)) == [dense_greedy(prompt, 16)]


def test_a_pinned_prefix_is_found_after_any_pressure(engine: Engine) -> None:
    assert ask(engine) == 0
    push_out(engine)
    assert ask(engine) == 0  # unless it is pinned
    push_out(engine)
    assert engine.pin_prefix(SYSTEM, pin_id="system") == 0  # before it is computed
    ask(engine)
    for _ in range(2):
        push_out(engine)
        assert ask(engine) == 28
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 7
    assert engine.pin_prefix(SYSTEM, pin_id="system") == 7  # again, now that it is there
    engine.unpin_prefix("system")
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert ask(engine) == 28  # until it is pushed out
    push_out(engine)
    assert ask(engine) == 0


def test_a_pin_ends_when_its_time_is_over(engine: Engine, clock: Clock) -> None:
    engine.pin_prefix(SYSTEM, pin_id="short", ttl=10.0)
    ask(engine)
    clock.ahead = 9.0
    push_out(engine)
    assert ask(engine) == 28
    engine.pin_prefix(SYSTEM, pin_id="short", ttl=10.0)  # its time begins anew
    clock.ahead = 18.0
    push_out(engine)
    assert ask(engine) == 28
    clock.ahead = 20.0
    push_out(engine)
    assert ask(engine) == 0
    with pytest.raises(InvalidRequestError, match="pin_id='short'"):
        engine.unpin_prefix("short")


def test_pins_give_way_to_a_request_that_needs_all_memory(engine: Engine) -> None:
    engine.pin_prefix(SYSTEM, pin_id="first", ttl=100.0)
    engine.pin_prefix(prompt_of(40, seed=9), pin_id="last")
    ask(engine)
    engine.generate(prompt_of(40, seed=9), GREEDY)
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 17
    prompt = prompt_of(60)
    (output,) = engine.generate(prompt, GREEDY.clone(max_tokens=56))  # 29 of 39 blocks
    assert output.outputs[0].token_ids == dense_greedy(prompt, 56)
    with pytest.raises(InvalidRequestError):
        engine.unpin_prefix("first")
    engine.unpin_prefix("last")


def test_all_pins_together_take_half_of_the_pool_at_most(engine: Engine) -> None:
    engine.pin_prefix(prompt_of(40), pin_id="a")
    engine.pin_prefix(prompt_of(40), pin_id="b")  # the same blocks count once
    with pytest.raises(InvalidRequestError, match="prompt='10 blocks'"):
        engine.pin_prefix(prompt_of(40, seed=1), pin_id="c")
    engine.pin_prefix(prompt_of(36, seed=1), pin_id="c")
    engine.generate(prompt_of(40), GREEDY.clone(max_tokens=1))
    engine.unpin_prefix("a")
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 10  # those of b
    engine.unpin_prefix("b")
    engine.unpin_prefix("c")


def test_a_pin_outlasts_what_its_blocks_held(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the cache was reset, or the pool was lost, it takes hold again of what is computed anew."""
    engine.pin_prefix(SYSTEM, pin_id="system")
    ask(engine)
    engine.reset_prefix_cache()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert ask(engine) == 0
    push_out(engine)
    assert ask(engine) == 28
    engine.add_request("struck", prompt_of(5), GREEDY)
    break_step(monkeypatch, engine, fail_and_lose_the_state)
    drain(engine)
    assert ask(engine) == 0
    push_out(engine)
    assert ask(engine) == 28
    engine.unpin_prefix("system")


def test_a_step_that_fails_unpins_what_it_did_not_write(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(runner: Any) -> None:
        raise RuntimeError("no step today")

    engine.pin_prefix(SYSTEM, pin_id="system")
    engine.add_request("struck", QUESTION, GREEDY)
    break_step(monkeypatch, engine, fail)
    assert drain(engine)["struck"].error is not None
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert ask(engine) == 0
    assert ask(engine) == 28
    engine.unpin_prefix("system")


def test_salts_keep_pins_apart(engine: Engine) -> None:
    engine.pin_prefix({"prompt_token_ids": SYSTEM, "cache_salt": "a"}, pin_id="a")
    engine.pin_prefix(SYSTEM, pin_id="b", cache_salt="b")
    ask(engine)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    for salt in "ab":
        engine.generate({"prompt_token_ids": QUESTION, "cache_salt": salt}, GREEDY)
    assert engine.stats().num_blocks - engine.stats().num_free_blocks == 14
    for name in "ab":
        engine.unpin_prefix(name)


def test_without_a_prefix_cache_nothing_can_be_pinned() -> None:
    refusal = pytest.raises(InvalidRequestError, match=r"pin_id='x'.*enable_prefix_caching")
    with sibling(enable_prefix_caching=False) as engine, refusal:
        engine.pin_prefix(SYSTEM, pin_id="x")


def test_pins_beside_preempted_requests() -> None:
    """Their blocks go to the host and come back, or are found where they are pinned."""
    for mode in ("swap", "recompute"):
        with sibling(async_scheduling=True, num_host_blocks=60, preemption_mode=mode, **FULL) as engine:
            engine.pin_prefix(PROMPTS[0], pin_id="x")
            engine.pin_prefix(PROMPTS[4], pin_id="y", ttl=1e-3)
            for n in (1, 2):
                outputs = engine.generate(PROMPTS, [params.clone(n=n) for params in PARAMS])
                for output, prompt, params in zip(outputs, PROMPTS, PARAMS, strict=True):
                    wanted = dense_greedy(prompt, params.max_tokens or 0)
                    assert [c.token_ids for c in output.outputs] == [wanted] * n
                engine.check_invariants()
            assert engine.stats().num_preemptions > 0
            core_of(engine).scheduler.space.pins.remove("x")


BAD_PINS: dict[str, tuple[Call, type[ValueError], str]] = {
    "no name": (lambda e: e.pin_prefix(SYSTEM, pin_id=""), InvalidRequestError, "pin_id=''"),
    "name": (lambda e: e.pin_prefix(SYSTEM, pin_id=5), InvalidRequestError, "pin_id=5"),
    "salt": (lambda e: e.pin_prefix(SYSTEM, pin_id="x", cache_salt=5), InvalidRequestError, "cache_salt=5"),
    "prompt": (lambda e: e.pin_prefix([-3], pin_id="x"), InvalidRequestError, "prompt_token_ids=-3"),
    "too many": (
        lambda e: e.pin_prefix(prompt_of(80), pin_id="x"),
        InvalidRequestError,
        "prompt='20 blocks': all pins may take 19 blocks",
    ),
    "unknown": (lambda e: e.unpin_prefix("nobody"), InvalidRequestError, "pin_id='nobody'"),
    **{
        f"ttl {ttl!r}": (
            lambda e, ttl=ttl: e.pin_prefix(SYSTEM, pin_id="x", ttl=ttl),
            InvalidRequestError,
            f"ttl={ttl!r}",
        )
        for ttl in (0, -1.0, float("nan"), float("inf"), "1", True)
    },
}


def test_a_wrong_pin_changes_nothing(engine: Engine) -> None:
    engine.pin_prefix(SYSTEM, pin_id="live")
    engine.add_request("live", QUESTION, GREEDY)
    engine.step()
    engine.step()
    for call, error, message in BAD_PINS.values():
        check_refused(engine, call, message, error)
    assert drain(engine)["live"].outputs[0].token_ids == dense_greedy(QUESTION, 16)
    engine.unpin_prefix("live")

"""An engine is given up when it fails alone, and not because of what somebody asks of it."""

import contextlib
import itertools
import logging
from collections.abc import Iterator

import pytest

from jaxpaged import Engine, RequestOutput, RequestOutputKind
from jaxpaged.serve.engine_health import EngineHealth
from tests.engine.family import core_of
from tests.engine.tiny import GREEDY, dense_greedy, prompt_of
from tests.serve.served_engines import Broken, assert_clean, break_steps, poisoned, tiny

DELTA = GREEDY.clone(output_kind=RequestOutputKind.DELTA)


@pytest.fixture(params=[False, True], ids=["in step", "ahead"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with tiny(async_scheduling=request.param) as found:
        yield found


def run(health: EngineHealth, engine: Engine) -> dict[str, RequestOutput]:
    """Steps until nothing is left; the last output of every request."""
    last = {}
    while engine.has_unfinished_requests:
        for output in health.step():
            last[output.request_id] = output
        engine.check_invariants()
    return last


def test_a_poisonous_request_does_no_harm_however_often_it_comes(engine: Engine) -> None:
    health = EngineHealth(engine)
    break_steps(engine, poisoned)
    for number in range(20):
        engine.add_request(f"poison-{number}", prompt_of(5), DELTA)
        last = run(health, engine)
        assert isinstance(last[f"poison-{number}"].error, Broken)
        assert_clean(engine.stats())
    engine.add_request("good", prompt_of(5), GREEDY)
    assert run(health, engine)["good"].outputs[0].token_ids == dense_greedy(prompt_of(5), 16)


@pytest.mark.parametrize("num_requests", [1, 30])
def test_an_engine_whose_every_step_fails_is_given_up(engine: Engine, num_requests: int) -> None:
    health = EngineHealth(engine)
    break_steps(engine, lambda step: True)
    numbers = itertools.count()
    num_struck = 0

    def one_more_step() -> int:
        while len(engine.block_tables()) < num_requests and not health.is_in_doubt:
            engine.add_request(f"request-{next(numbers)}", prompt_of(5), DELTA)
        return sum(output.error is not None for output in health.step())

    with contextlib.suppress(Broken):
        while num_struck < 1000:
            num_struck += one_more_step()
    assert 3 <= num_struck < 1000


def test_what_fails_in_company_says_nothing_of_the_engine(engine: Engine) -> None:
    """Poison in every step, so that our own request fails too, until nobody joins it any more."""
    health, steps = EngineHealth(engine), 0
    break_steps(engine, poisoned)
    while not health.is_in_doubt:
        engine.add_request(f"poison-{steps}", prompt_of(5), DELTA)
        health.step()
        steps += 1
        assert steps < 50
    run(health, engine)
    assert not health.is_in_doubt
    assert_clean(engine.stats())
    engine.add_request("good", prompt_of(5), GREEDY)
    assert run(health, engine)["good"].outputs[0].token_ids == dense_greedy(prompt_of(5), 16)


def test_failures_among_successes_are_never_followed_up(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    health = EngineHealth(engine)
    break_steps(engine, poisoned)
    for number in range(10):
        engine.add_request(f"poison-{number}", prompt_of(5), DELTA)
        run(health, engine)
        engine.add_request(f"good-{number}", prompt_of(5), DELTA.clone(max_tokens=1))
        run(health, engine)
    assert "does the engine still work" not in caplog.text


@pytest.mark.parametrize("times", [1, 2])
def test_a_step_that_raises_is_tried_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    health, left = EngineHealth(engine), itertools.chain([True] * times, itertools.repeat(False))
    schedule = core_of(engine).scheduler.schedule

    def fail_at_first() -> object:
        if next(left):
            raise Broken("no plan today")
        return schedule()

    monkeypatch.setattr(core_of(engine).scheduler, "schedule", fail_at_first)
    engine.add_request("x", prompt_of(9), GREEDY)
    assert run(health, engine)["x"].outputs[0].token_ids == dense_greedy(prompt_of(9), 16)


def test_an_engine_that_cannot_step_at_all_is_given_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise Broken("no plan ever")

    monkeypatch.setattr(core_of(engine).scheduler, "schedule", fail)
    health = EngineHealth(engine)
    engine.add_request("x", prompt_of(9), GREEDY)
    with caplog.at_level(logging.ERROR):
        assert health.step() == []
        assert health.step() == []
        assert caplog.text.count("is tried again") == 2
        with pytest.raises(Broken):
            health.step()


def test_nobody_can_have_the_name_of_the_proof(engine: Engine) -> None:
    health = EngineHealth(engine)
    break_steps(engine, poisoned)
    names = set()
    for number in range(9):
        engine.add_request(f"poison-{number}", prompt_of(5), DELTA)
        while engine.has_unfinished_requests:
            names |= {name for name in engine.block_tables() if not name.startswith("poison")}
            health.step()
    assert len(names) == 3
    assert all(name.startswith("proof-of-health-") and len(name) > 30 for name in names)

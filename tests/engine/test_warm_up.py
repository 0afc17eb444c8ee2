"""The warm-up tells how far it is, and can be stopped."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from jaxpaged import Engine
from jaxpaged.runner import Runner
from tests.engine.family import core_of
from tests.engine.tiny import GREEDY, dense_greedy, drain, new_engine, prompt_of

# Buckets 1, 2 and 4, several decode steps in the first, three small programs.
FEW: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 4}
TOTAL = 3 + 1 + 3


class Stop(Exception):
    """Somebody does not want the engine any more."""


class Compiles:
    """In the place of compiling: notes what is asked for, and whether two are under way at once."""

    def __init__(self) -> None:
        self.shapes: list[str] = []
        self.together = threading.Barrier(4)

    def __call__(self, jitted: Any, shape: str, *arguments: Any) -> Any:
        self.shapes.append(shape)
        return None

    def four_at_once(self, jitted: Any, shape: str, *arguments: Any) -> Any:
        self.shapes.append(shape)
        self.together.wait(timeout=60)
        return None


@pytest.fixture
def runner() -> Iterator[Runner]:
    with new_engine() as engine:
        yield core_of(engine).runner


def test_progress_ascends_to_all_programs() -> None:
    seen: list[tuple[int, int]] = []
    with new_engine(**FEW) as engine:
        engine.warm_up(lambda done, total: seen.append((done, total)))
        assert seen == [(done, TOTAL) for done in range(TOTAL + 1)]
        assert engine.stats().num_compiles == TOTAL
        assert core_of(engine).runner.forbid_compile
        seen.clear()
        engine.warm_up(lambda done, total: seen.append((done, total)))  # they are there already
        assert seen[-1] == (TOTAL, TOTAL)
        assert engine.stats().num_compiles == TOTAL


def test_a_stopped_warm_up_leaves_an_engine_that_works() -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise Stop

    with new_engine(**FEW) as engine:
        with pytest.raises(Stop):
            core_of(engine).runner.warm_up(max_workers=2, progress=stop)
        assert 1 <= engine.stats().num_compiles <= 2
        check_it_generates(engine)
        engine.warm_up()
        assert engine.stats().num_compiles == TOTAL
        check_it_generates(engine)


def check_it_generates(engine: Engine) -> None:
    engine.reset_prefix_cache()
    engine.add_request("x", prompt_of(5), GREEDY)
    assert drain(engine)["x"].outputs[0].token_ids == dense_greedy(prompt_of(5), 16)


def test_nothing_is_compiled_when_the_first_call_raises(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiles = Compiles()
    monkeypatch.setattr(runner, "_compile", compiles)

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        runner.warm_up(max_workers=4, progress=stop)
    assert compiles.shapes == []
    assert not runner.forbid_compile


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt(), SystemExit(0)], ids=repr)
def test_after_a_stop_nothing_is_begun(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """All four threads are at work when it comes; they finish what they have begun."""
    compiles, calls = Compiles(), []
    monkeypatch.setattr(runner, "_compile", compiles.four_at_once)

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if done:
            raise error

    with pytest.raises(type(error)):
        runner.warm_up(max_workers=4, progress=stop)
    assert len(compiles.shapes) == 4
    assert calls == [0, 1]
    assert not runner.forbid_compile


def test_a_program_that_cannot_be_compiled_ends_the_warm_up(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fail(jitted: Any, shape: str, *arguments: Any) -> Any:
        raise Stop(shape)

    monkeypatch.setattr(runner, "_compile", fail)
    with pytest.raises(Stop, match="bucket of"):
        runner.warm_up(max_workers=2, progress=lambda done, total: calls.append(done))
    assert calls == [0]
    assert not runner.forbid_compile


def test_progress_is_never_told_twice_at_once(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles, entered, seen = Compiles(), threading.Lock(), []
    monkeypatch.setattr(runner, "_compile", compiles)

    def progress(done: int, total: int) -> None:
        assert entered.acquire(blocking=False), "told twice at once"
        time.sleep(0.002)  # time for others to come
        seen.append(done)
        entered.release()

    runner.warm_up(max_workers=4, progress=progress)
    assert seen == list(range(len(compiles.shapes) + 1))
    assert len(compiles.shapes) == 5 + 4 + 3
    assert runner.forbid_compile

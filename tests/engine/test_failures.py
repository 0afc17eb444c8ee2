"""A failure ends the requests that it strikes, never the engine, and leaks nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import pytest

from jaxpaged import Engine, RequestOutput
from jaxpaged.detokenizer import IncrementalDetokenizer
from jaxpaged.errors import RecompileError
from jaxpaged.policies import Fcfs
from jaxpaged.request import Request
from tests.engine.tiny import GREEDY, dense_greedy, drain, new_engine, prompt_of


class Broken(RuntimeError):
    """What the tests raise."""


def break_step(monkeypatch: pytest.MonkeyPatch, engine: Engine, failure: Callable[[Any], None]) -> None:
    """The next step calls ``failure(runner)`` instead of its program."""
    runner = engine._core.runner  # type: ignore[union-attr]
    originals = {name: getattr(runner, name) for name in ("execute", "execute_decode_steps")}

    def execute_once(*args: Any, **kwargs: Any) -> Any:
        for name, original in originals.items():
            monkeypatch.setattr(runner, name, original)
        failure(runner)

    for name in originals:
        monkeypatch.setattr(runner, name, execute_once)


def fail(runner: Any) -> None:
    raise Broken("no step today")


def fail_and_lose_the_state(runner: Any) -> None:
    for array in jax.tree.leaves(runner.state):
        array.delete()  # as donation does
    raise Broken("no step today")


def interrupt(runner: Any) -> None:
    raise KeyboardInterrupt


def reasons(output: RequestOutput) -> list[str | None]:
    return [completion.finish_reason for completion in output.outputs]


@pytest.mark.parametrize("failure", [fail, fail_and_lose_the_state])
@pytest.mark.parametrize("n", [1, 3])
def test_a_step_that_raises_ends_its_requests_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, failure: Callable[[Any], None], n: int
) -> None:
    prompt = prompt_of(40)
    engine.add_request("struck", prompt, GREEDY.clone(n=n))  # its prompt takes the whole budget of the step
    engine.add_request("spared", prompt, GREEDY.clone(n=n))
    break_step(monkeypatch, engine, failure)
    outputs = drain(engine)
    struck = outputs["struck"]
    assert isinstance(struck.error, Broken)
    assert struck.finished
    assert reasons(struck) == ["error"] * n
    assert outputs["spared"].error is None
    assert [c.token_ids for c in outputs["spared"].outputs] == [dense_greedy(prompt, 16)] * n
    # The name can be used again, and what the failed step was to write is not in the prefix cache.
    engine.add_request("struck", prompt, GREEDY)
    assert drain(engine)["struck"].outputs[0].token_ids == dense_greedy(prompt, 16)


@pytest.mark.parametrize("failure", [fail, fail_and_lose_the_state])
def test_a_failure_in_the_middle(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, failure: Callable[[Any], None]
) -> None:
    """Eight run and end; two that waited take their place, with what they share recomputed if it was lost."""
    prompts = [prompt_of(8, seed=i) for i in range(10)]
    finished = engine.stats().finished.get("error", 0)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, GREEDY.clone(max_tokens=10))
    for _ in range(8):
        engine.step()
    break_step(monkeypatch, engine, failure)
    outputs = drain(engine)
    assert len(outputs) == 10
    errors = [name for name, output in outputs.items() if output.error is not None]
    assert 0 < len(errors) < 10
    assert engine.stats().finished["error"] - finished == len(errors)
    for i, prompt in enumerate(prompts):
        wanted = dense_greedy(prompt, 10)
        tokens = outputs[str(i)].outputs[0].token_ids
        assert tokens == (wanted[: len(tokens)] if str(i) in errors else wanted)


def test_a_completion_that_had_ended_keeps_its_end(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    params = GREEDY.clone(n=2, temperature=1.0, seed=1, max_tokens=30)
    (free,) = engine.generate(prompt_of(5), params)
    stop = next(t for t in free.outputs[1].token_ids if t not in free.outputs[0].token_ids)
    before = engine.stats().finished
    engine.add_request("x", prompt_of(5), params.clone(stop_token_ids=[stop]))
    ended = None
    while ended is None:
        for output in engine.step():
            ended = next((c for c in output.outputs if c.finished), None)
    break_step(monkeypatch, engine, fail)
    last = drain(engine)["x"]
    assert reasons(last) == ["error", "stop"]
    after = engine.stats().finished
    assert {reason: after[reason] - before.get(reason, 0) for reason in ("error", "stop")} == {
        "error": 1,
        "stop": 1,
    }


def test_generate_and_stream_raise_what_struck_them(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add_request("other", prompt_of(7), GREEDY)
    break_step(monkeypatch, engine, fail)
    with pytest.raises(Broken):
        engine.generate([prompt_of(5), prompt_of(6)], GREEDY)
    assert isinstance(drain(engine)["other"].error, Broken)  # it was in the same step and learns it too
    break_step(monkeypatch, engine, fail)
    with pytest.raises(Broken):
        list(engine.stream(prompt_of(5), GREEDY))


@pytest.mark.parametrize("steps", range(7))
def test_an_interrupt_aborts_only_what_generate_began(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Whatever blocks the interrupted step had published or meant to copy were never written."""
    prompts = [prompt_of(22), prompt_of(5), prompt_of(9)]
    aborted = engine.stats().finished.get("abort", 0)
    engine.add_request("other", prompts[0], GREEDY.clone(n=3))
    for _ in range(steps):
        engine.step()
    break_step(monkeypatch, engine, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts[1:], GREEDY)
    assert list(engine.block_tables()) == ["other"]
    assert engine.stats().finished["abort"] - aborted == 2
    engine.check_invariants()
    for prompt in prompts[1:]:
        (output,) = engine.generate(prompt, GREEDY)
        assert output.outputs[0].token_ids == dense_greedy(prompt, 16)
    last = drain(engine)["other"]
    assert [c.token_ids for c in last.outputs] == [dense_greedy(prompts[0], 16)] * 3


def test_text_that_fails_ends_one_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = {name: prompt_of(6, seed=i) for i, name in enumerate(("a", "b"))}
    wanted = {name: dense_greedy(prompt, 16) for name, prompt in prompts.items()}
    cursed = next(token for token in wanted["a"][3:] if token not in wanted["b"])
    append = IncrementalDetokenizer.append

    def fail_at_one_token(self: IncrementalDetokenizer, token_id: int) -> str:
        if token_id == cursed:
            raise Broken("no text")
        return append(self, token_id)

    monkeypatch.setattr(IncrementalDetokenizer, "append", fail_at_one_token)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY.clone(n=2))
    outputs = drain(engine)
    assert isinstance(outputs["a"].error, Broken)
    assert reasons(outputs["a"]) == ["error"] * 2
    assert [c.token_ids for c in outputs["b"].outputs] == [wanted["b"]] * 2


@pytest.mark.parametrize("n", [1, 3])
def test_an_abort_whose_text_fails_still_ends_the_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    engine.add_request("doomed", prompt_of(9), GREEDY.clone(n=n))
    engine.step()

    def flush(self: IncrementalDetokenizer) -> str:
        raise Broken("no text today")

    with monkeypatch.context() as patched:
        patched.setattr(IncrementalDetokenizer, "flush", flush)
        engine.abort_request("doomed")
    outputs = engine.step()
    assert [(output.request_id, output.finished) for output in outputs] == [("doomed", True)]
    assert isinstance(outputs[0].error, Broken)
    assert engine.block_tables() == {}
    engine.check_invariants()
    engine.add_request("doomed", prompt_of(9), GREEDY)  # its name is free again
    assert drain(engine)["doomed"].error is None


def test_a_missing_program_after_the_warm_up_names_its_shape() -> None:
    with new_engine(max_num_seqs=1, max_num_batched_tokens=2, warmup=True) as engine:
        assert engine.generate(prompt_of(5), GREEDY)[0].outputs[0].token_ids == dense_greedy(prompt_of(5), 16)
        del engine._core.runner._programs[2, 1]  # type: ignore[union-attr]
        with pytest.raises(RecompileError, match=r"bucket of 2 tokens.*not compiled in the warm-up"):
            engine.generate(prompt_of(6), GREEDY)
        engine.add_request("x", prompt_of(6), GREEDY)
        assert isinstance(drain(engine)["x"].error, RecompileError)
        # What needs other programs still runs.
        assert engine.generate(prompt_of(1), GREEDY)[0].outputs[0].token_ids == dense_greedy(prompt_of(1), 16)


class RaisesOnce(Fcfs):
    """A policy with a mistake in it, or somebody's Ctrl-C while it thinks."""

    window = 2

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        if self.error is not None and len(candidates[0].token_ids) == 30:
            error, self.error = self.error, None
            raise error
        return 0


@pytest.mark.parametrize(
    "error", [Broken("no choice today"), KeyboardInterrupt()], ids=["error", "interrupt"]
)
def test_a_plan_that_is_not_finished_is_forgotten(error: BaseException) -> None:
    """Blocks were taken and published by then for a request of the same step, which has not run."""
    first, second, third = prompt_of(9, seed=1), prompt_of(30, seed=2), [*prompt_of(9, seed=1), 7, 8]
    with new_engine(scheduling_policy=RaisesOnce(error), max_num_batched_tokens=64) as engine:
        for name, prompt in (("first", first), ("second", second), ("third", third)):
            engine.add_request(name, prompt, GREEDY)
        with pytest.raises(type(error)):
            engine.step()
        engine.check_invariants()
        engine.abort_request("first")
        outputs = drain(engine)
        assert outputs["second"].outputs[0].token_ids == dense_greedy(second, 16)
        assert outputs["third"].outputs[0].token_ids == dense_greedy(third, 16)
        assert engine.stats().num_free_blocks == engine.stats().num_blocks

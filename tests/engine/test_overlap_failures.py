"""One step ahead: failures, interrupts and aborts while a step is on its way."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import pytest

from jaxpaged import Engine, RequestOutput, RequestOutputKind
from tests.engine.family import core_of, in_flight, sibling, watch
from tests.engine.tiny import GREEDY, dense_greedy, drain, new_engine, prompt_of, tokens_of

DELTA = GREEDY.clone(output_kind=RequestOutputKind.DELTA)


class Broken(RuntimeError):
    """What the tests raise."""


def strike(monkeypatch: pytest.MonkeyPatch, engine: Engine, number: int, where: str, what: str) -> None:
    """Step ``number`` from now on fails where it is launched or fetched, and may take the device's state along."""

    def raise_it(i: int) -> None:
        if i != number:
            return
        if what == "interrupt":
            raise KeyboardInterrupt
        if what == "state lost":
            for array in jax.tree.leaves(core_of(engine).runner.state):
                array.delete()
        raise Broken("no step today")

    nothing: Callable[[int], None] = lambda i: None  # noqa: E731
    watch(
        monkeypatch,
        engine,
        raise_it if where == "launch" else nothing,
        raise_it if where == "fetch" else nothing,
    )


PLACES = pytest.mark.parametrize("where", ["launch", "fetch"])


@PLACES
@pytest.mark.parametrize("what", ["error", "state lost"])
@pytest.mark.parametrize("number", range(7))
def test_a_step_that_fails_ends_its_requests_only(
    ahead: Engine, monkeypatch: pytest.MonkeyPatch, number: int, where: str, what: str
) -> None:
    """Prompts in chunks, a shared prefix, forks: whatever the step that fails was to do for them."""
    prompts = {"a": prompt_of(40), "b": [*prompt_of(40)[:33], 5, 6], "c": prompt_of(9), "late": prompt_of(3)}
    in_step: set[str] = set()
    plan = core_of(ahead).scheduler.schedule
    planned = iter(range(10**6))

    def schedule() -> Any:
        step = plan()
        if step.rows and next(planned) == number:
            in_step.update(request.request_id for request, _ in step.rows)
        return step

    monkeypatch.setattr(core_of(ahead).scheduler, "schedule", schedule)
    strike(monkeypatch, ahead, number, where, what)
    for name in "abc":
        ahead.add_request(name, prompts[name], GREEDY.clone(n=2 if name == "b" else 1))
    outputs: dict[str, RequestOutput] = {}
    for turn in range(100):
        if turn == number + 1:  # its prompt comes with the step after the one that fails
            ahead.add_request("late", prompts["late"], GREEDY)
        outputs |= {output.request_id: output for output in ahead.step()}
        ahead.check_invariants()
        if turn > number and not ahead.has_unfinished_requests:
            break
    assert {name for name, output in outputs.items() if output.error is not None} == in_step != set()
    for name, output in outputs.items():
        wanted = dense_greedy(prompts[name], 16)
        for completion in output.outputs:
            tokens = completion.token_ids
            assert tokens == (wanted[: len(tokens)] if output.error else wanted)
            assert completion.finish_reason == ("error" if output.error else "length")
    assert outputs.keys() == prompts.keys()
    monkeypatch.undo()
    for name, prompt in prompts.items():  # the names are free again, and no unwritten block is found
        assert tokens_of(ahead.generate(prompt, GREEDY)) == [dense_greedy(prompt, 16)], name


def test_who_is_struck_keeps_what_was_on_its_way(ahead: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that cannot be launched comes after the one under way, whose tokens are good."""
    strike(monkeypatch, ahead, 2, "launch", "error")
    ahead.add_request("x", prompt_of(5), GREEDY.clone(max_tokens=30))
    (completion,) = drain(ahead)["x"].outputs
    num_tokens = 1 + ahead.config.num_scheduler_steps  # of the prompt's step and one of decoding
    assert completion.token_ids == dense_greedy(prompt_of(5), num_tokens)


@pytest.mark.parametrize("where", ["launch", "fetch", "results"])
@pytest.mark.parametrize("number", range(6))
def test_an_interrupt_loses_nothing(
    ahead: Engine, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    """Ctrl-C anywhere: who goes on stepping gets every token once."""
    if where == "results":
        interrupt_in_results(monkeypatch, ahead, number)
    else:
        strike(monkeypatch, ahead, number, where, "interrupt")
    prompts = {"a": prompt_of(22), "b": prompt_of(5), "c": prompt_of(3)}
    ahead.add_request("a", prompts["a"], DELTA.clone(n=3))
    ahead.add_request("b", prompts["b"], DELTA)
    ahead.add_request("c", prompts["c"], DELTA.clone(logit_bias={7: 1e-9}, max_tokens=2))
    got: dict[tuple[str, int], list[int]] = defaultdict(list)
    interrupts = 0
    while ahead.has_unfinished_requests:
        try:
            outputs = ahead.step()
        except KeyboardInterrupt:
            interrupts += 1
            ahead.check_invariants()
            continue
        for output in outputs:
            for completion in output.outputs:
                got[output.request_id, completion.index] += completion.token_ids
        ahead.check_invariants()
    assert interrupts == 1
    assert got == {
        (name, index): dense_greedy(prompts[name], 2 if name == "c" else 16)
        for name, index in [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0)]
    }


def interrupt_in_results(monkeypatch: pytest.MonkeyPatch, engine: Engine, number: int) -> None:
    """The ``number``-th token is interrupted after the request has taken it, before anybody has seen it."""
    results, count = core_of(engine).results, iter(range(10**6))
    take = results._take_token

    def interrupted(*arguments: Any) -> None:
        if next(count) == number:
            raise KeyboardInterrupt
        take(*arguments)

    monkeypatch.setattr(results, "_take_token", interrupted)


@PLACES
def test_an_interrupt_aborts_only_what_generate_began(
    ahead: Engine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    prompts = [prompt_of(22), prompt_of(5), prompt_of(9)]
    ahead.add_request("other", prompts[0], GREEDY.clone(n=3))
    strike(monkeypatch, ahead, 3, where, "interrupt")
    with pytest.raises(KeyboardInterrupt):
        ahead.generate(prompts[1:], GREEDY)
    assert list(ahead.block_tables()) == ["other"]
    ahead.check_invariants()
    for prompt in prompts[1:]:
        assert tokens_of(ahead.generate(prompt, GREEDY)) == [dense_greedy(prompt, 16)]
    last = drain(ahead)["other"]
    assert [c.token_ids for c in last.outputs] == [dense_greedy(prompts[0], 16)] * 3


# Requests that leave while a step is on its way.


@pytest.mark.parametrize("steps", range(7))
def test_abort_in_flight_and_the_name_again(ahead: Engine, steps: int) -> None:
    prompt = prompt_of(22)
    ahead.add_request("first", prompt_of(7), GREEDY)
    ahead.add_request("doomed", prompt, GREEDY.clone(n=3))
    for _ in range(steps):
        ahead.step()
    assert in_flight(ahead) == (steps > 0)
    ahead.abort_request("doomed")
    ahead.check_invariants()
    other = prompt_of(13, seed=4)  # takes row and blocks of the old one
    ahead.add_request("doomed", other, GREEDY)
    ends = defaultdict(list)
    while ahead.has_unfinished_requests:
        for output in ahead.step():
            if output.finished:
                ends[output.request_id].append((output.outputs[0].finish_reason, output.outputs[0].token_ids))
        ahead.check_invariants()
    assert [reason for reason, _ in ends["doomed"]] == ["abort", "length"]
    assert ends["doomed"][1][1] == dense_greedy(other, 16)
    assert ends["first"] == [("length", dense_greedy(prompt_of(7), 16))]


def test_a_dropped_stream(ahead: Engine) -> None:
    for count in range(5):
        stream = ahead.stream(prompt_of(9), GREEDY)
        for _, _ in zip(range(count), stream, strict=False):
            pass
        del stream
        assert ahead.block_tables() == {}
        ahead.check_invariants()
    assert tokens_of(ahead.generate(prompt_of(9), GREEDY)) == [dense_greedy(prompt_of(9), 16)]


def test_close_with_a_step_in_flight() -> None:
    engine = new_engine(async_scheduling=True, num_host_blocks=8)
    with sibling() as other:  # for its programs
        programs = core_of(other).runner._programs
        core_of(engine).runner._programs.update(programs)
        engine.add_request("left", prompt_of(5), GREEDY)
        engine.step()
        assert in_flight(engine) == 1
        state = core_of(engine).runner.state
        engine.close()
        assert all(array.is_deleted() for array in jax.tree.leaves(state))
        assert tokens_of(other.generate(prompt_of(5), GREEDY)) == [dense_greedy(prompt_of(5), 16)]

"""Aborts, streams, and several callers at one engine: nothing is lost, nothing is left."""

import gc
from collections import defaultdict
from typing import Any

import jax
import pytest

from jaxpaged import Engine, RequestOutput, RequestOutputKind, SamplingParams
from jaxpaged.errors import EngineClosedError, InvalidRequestError, UnknownRequestError
from tests.engine.tiny import GREEDY, dense_greedy, drain, idle, new_engine, prompt_of, tokens_of

DELTA = GREEDY.clone(output_kind=RequestOutputKind.DELTA)


def test_a_hundred_aborts_in_mid_stream(engine: Engine) -> None:
    prompt = prompt_of(18)
    for i in range(100):
        stream = engine.stream(prompt, GREEDY.clone(n=1 + i % 3), request_id="again")
        for _, _ in zip(range(i % 5), stream, strict=False):
            pass
        if i % 2:
            engine.abort_request("again")
            last = list(stream)
            assert last[-1].finished
            assert {c.finish_reason for c in last[-1].outputs} == {"abort"}
        del stream
        assert engine.block_tables() == {}
        engine.check_invariants()
    assert tokens_of(engine.generate(prompt, GREEDY)) == [dense_greedy(prompt, 16)]


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("n", [1, 4])
def test_abort_in_every_state(engine: Engine, steps: int, n: int) -> None:
    """Waiting, in the middle of the prompt, with completions that wait for it, running, done in part."""
    prompt = prompt_of(40)
    engine.add_request("first", prompt_of(20), GREEDY)
    engine.add_request("doomed", prompt, GREEDY.clone(n=n))
    engine.add_request("last", prompt, GREEDY)
    for _ in range(steps):
        engine.step()
    engine.abort_request("doomed")
    engine.check_invariants()
    assert "doomed" not in engine.block_tables()
    with pytest.raises(UnknownRequestError):
        engine.abort_request("doomed")
    engine.add_request("doomed", prompt, GREEDY)  # while its predecessor's last output has yet to come
    outputs: dict[str, list[RequestOutput]] = defaultdict(list)
    while engine.has_unfinished_requests:
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.check_invariants()
    ends = [output for output in outputs["doomed"] if output.finished]
    assert [{c.finish_reason for c in end.outputs} for end in ends] == [{"abort"}, {"length"}]
    for name, length in (("first", 20), ("last", 40), ("doomed", 40)):
        assert outputs[name][-1].outputs[0].token_ids == dense_greedy(prompt_of(length), 16)


def test_abort_of_the_preempted(engine: Engine) -> None:
    names = [str(i) for i in range(8)]
    for i, name in enumerate(names):
        engine.add_request(name, prompt_of(20, seed=i), GREEDY.clone(max_tokens=30))
    before = engine.stats().num_preemptions
    while engine.stats().num_preemptions == before:
        engine.step()
    waiting = [name for name, tables in engine.block_tables().items() if not tables[0]]
    assert waiting
    for name in waiting:
        engine.abort_request(name)
        engine.check_invariants()
    outputs = drain(engine)
    for i, name in enumerate(names):
        reason = "abort" if name in waiting else "length"
        assert outputs[name].outputs[0].finish_reason == reason
        if reason == "length":
            assert outputs[name].outputs[0].token_ids == dense_greedy(prompt_of(20, seed=i), 30)


def test_a_dropped_stream_ends_its_request(engine: Engine) -> None:
    stream = engine.stream(prompt_of(5), GREEDY)
    assert len(engine.block_tables()) == 1
    del stream  # nobody ever asked it for anything
    assert engine.block_tables() == {}
    for output in engine.stream(prompt_of(5), GREEDY):
        assert len(output.outputs[0].token_ids) == 1
        break
    gc.collect()
    assert engine.block_tables() == {}
    with pytest.raises(ZeroDivisionError):
        [1 // 0 for _ in engine.stream(prompt_of(5), GREEDY)]
    assert engine.block_tables() == {}


def test_an_old_stream_leaves_a_new_request_of_its_name_alone(engine: Engine) -> None:
    stream = engine.stream(prompt_of(5), GREEDY.clone(max_tokens=1), request_id="x")
    assert next(stream).finished
    engine.add_request("x", prompt_of(5), GREEDY)
    assert list(stream) == []
    del stream
    assert drain(engine)["x"].outputs[0].token_ids == dense_greedy(prompt_of(5), 16)


def test_callers_that_take_turns_lose_nothing(engine: Engine) -> None:
    """Two streams, queued requests, generate and step, each driving the engine for all."""
    prompts = {name: prompt_of(5 + i, seed=i) for i, name in enumerate("abcde")}
    got: dict[str, list[int]] = defaultdict(list)
    engine.add_request("a", prompts["a"], DELTA)
    streams = {name: engine.stream(prompts[name], DELTA, request_id=name) for name in "bc"}
    engine.add_request("d", prompts["d"], DELTA)

    def take(outputs: list[RequestOutput]) -> None:
        for output in outputs:
            got[output.request_id] += output.outputs[0].token_ids

    for turn in range(6):
        for stream in streams.values():
            take([next(stream)])
        take(engine.step())
        if turn == 2:
            (whole,) = engine.generate(prompts["e"], GREEDY)
            got["e"] = whole.outputs[0].token_ids
    for name, stream in streams.items():
        rest = list(stream)
        assert all(output.request_id == name for output in rest)
        take(rest)
    while engine.has_unfinished_requests:
        take(engine.step())
    assert got == {name: dense_greedy(prompt, 16) for name, prompt in prompts.items()}


def test_a_stream_has_the_kind_of_output_it_is_asked_for(engine: Engine) -> None:
    wanted = dense_greedy(prompt_of(5), 16)
    parts = [o.outputs[0].token_ids for o in engine.stream(prompt_of(5), GREEDY)]
    assert [token for part in parts for token in part] == wanted
    assert len(parts[0]) == 1  # the first token does not wait for others
    with new_engine(num_scheduler_steps=1) as one_by_one:
        parts = [o.outputs[0].token_ids for o in one_by_one.stream(prompt_of(5), GREEDY)]
        assert parts == [[token] for token in wanted]
    final = GREEDY.clone(output_kind=RequestOutputKind.FINAL_ONLY)
    assert [o.outputs[0].token_ids for o in engine.stream(prompt_of(5), final)] == [wanted]


def test_nothing_works_after_close() -> None:
    engine = new_engine()
    engine.add_request("left", prompt_of(5), GREEDY)
    stream = engine.stream(prompt_of(5), GREEDY)
    engine.close()
    engine.close()
    calls: list[Any] = [
        lambda: engine.generate([3]),
        lambda: engine.generate([]),
        lambda: engine.stream([3]),
        lambda: engine.stream([3], request_id="x"),
        lambda: engine.add_request("x", [3]),
        lambda: engine.abort_request("left"),
        engine.step,
        engine.stats,
        engine.warm_up,
        engine.block_tables,
        engine.reset_prefix_cache,
        engine.check_invariants,
        lambda: engine.has_unfinished_requests,
        engine.__enter__,
        lambda: next(stream),
    ]
    for call in calls:
        with pytest.raises(EngineClosedError):
            call()


def test_an_engine_gives_its_arrays_back() -> None:
    """By close(), at the end of a with block, after an error in one, and when the last reference goes."""
    gc.collect()
    before = len(jax.live_arrays())

    def used() -> Engine:
        engine = new_engine()
        engine.generate(prompt_of(5), GREEDY.clone(max_tokens=2))
        assert len(jax.live_arrays()) > before
        return engine

    engine = used()
    engine.close()
    assert len(jax.live_arrays()) == before
    with used() as engine:
        engine.add_request("left", prompt_of(5))
    assert len(jax.live_arrays()) == before
    with pytest.raises(InvalidRequestError), used() as engine:
        engine.generate([[]])
    assert len(jax.live_arrays()) == before
    engine = used()
    del engine
    gc.collect()
    assert len(jax.live_arrays()) == before


def test_a_default_request(engine: Engine) -> None:
    """16 tokens at temperature 1, all three calls alike in shape."""
    with idle(engine):
        engine.add_request("x", prompt_of(5))
        outputs = [drain(engine)["x"], engine.generate(prompt_of(5))[0], *engine.generate([prompt_of(5)])]
        assert all(0 < len(output.outputs[0].token_ids) <= 16 for output in outputs)
        assert SamplingParams().max_tokens == 16

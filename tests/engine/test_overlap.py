"""Running one step ahead of the device: the same tokens, sooner; failures, interrupts and aborts in between."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from jaxpaged import Engine, RequestOutput, RequestOutputKind, SamplingParams
from jaxpaged.runner import _SMALL_PROGRAMS
from tests.engine.family import (
    FULL,
    LENGTHS,
    PARAMS,
    PROMPTS,
    core_of,
    in_flight,
    sibling,
    watch,
)
from tests.engine.tiny import GREEDY, dense_greedy, drain, prompt_of, tokens_of

DELTA = GREEDY.clone(output_kind=RequestOutputKind.DELTA)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [dense_greedy(prompt, count) for prompt, (_, count) in zip(PROMPTS, LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def behind() -> Iterator[Engine]:
    """The same without running ahead."""
    with sibling(num_scheduler_steps=1, **FULL) as engine:
        yield engine


# The tokens are those of a dense forward pass, however they came about.


def test_alone_and_chunked(ahead: Engine, expected: list[list[int]]) -> None:
    for prompt, params, tokens in zip(PROMPTS, PARAMS, expected, strict=True):
        ahead.reset_prefix_cache()
        before = ahead.stats().num_steps
        assert tokens_of(ahead.generate(prompt, params)) == [tokens]
        # No step is run for nothing: it is known before the last token comes that it is the last.
        assert ahead.stats().num_steps - before == -(-len(prompt) // 16) + len(tokens) - 1


def test_batched(ahead: Engine, expected: list[list[int]]) -> None:
    some = [1, 4, 6]
    before = ahead.stats()
    outputs = ahead.generate([PROMPTS[i] for i in some], [PARAMS[i].clone(max_tokens=20) for i in some])
    assert tokens_of(outputs) == [expected[i][:20] for i in some]
    assert ahead.stats().num_preemptions == before.num_preemptions
    assert ahead.stats().num_steps - before.num_steps < 25


def test_preempted(ahead: Engine, expected: list[list[int]]) -> None:
    before = ahead.stats().num_preemptions
    outputs = ahead.generate(PROMPTS, PARAMS)
    assert tokens_of(outputs) == expected
    preemptions = [output.metrics.num_preemptions for output in outputs if output.metrics]
    assert ahead.stats().num_preemptions - before == sum(preemptions) > 0


def test_cached(ahead: Engine, expected: list[list[int]]) -> None:
    ahead.generate(PROMPTS[0], PARAMS[0])
    longer = PROMPTS[0] + expected[0][:20]  # what was generated is found as well
    (output,) = ahead.generate(longer, GREEDY.clone(max_tokens=10))
    assert output.outputs[0].token_ids == expected[0][20:]
    assert output.num_cached_tokens == (len(longer) - 1) // 4 * 4


def test_a_prefix_is_found_while_it_is_computed(ahead: Engine, expected: list[list[int]]) -> None:
    """The second request takes blocks that a step on its way is about to fill."""
    ahead.add_request("first", PROMPTS[0], PARAMS[0])
    ahead.step()
    ahead.step()
    ahead.add_request("second", PROMPTS[0], PARAMS[0])
    before = ahead.stats().prefix_cache_hits
    last = drain(ahead)
    assert ahead.stats().prefix_cache_hits - before >= 32
    assert [last[name].outputs[0].token_ids for name in ("first", "second")] == [expected[0]] * 2


@pytest.mark.parametrize(("which", "n"), [(5, 2), (1, 8), (0, 3)])
def test_forked(ahead: Engine, expected: list[list[int]], which: int, n: int) -> None:
    before = ahead.stats()
    ahead.add_request("fork", PROMPTS[which], PARAMS[which].clone(n=n))
    last = drain(ahead)["fork"]
    assert [c.token_ids for c in last.outputs] == [expected[which]] * n
    assert ahead.stats().blocks_copied > before.blocks_copied
    if (which, n) == (1, 8):  # eight times 43 tokens do not fit
        assert ahead.stats().num_preemptions > before.num_preemptions


def test_ended_by_a_token_in_the_middle(ahead: Engine, expected: list[list[int]]) -> None:
    """The step that was launched before the end was known is seen by nobody, in the prefix cache neither."""
    stops = [tokens[len(tokens) // 2] for tokens in expected]
    params = [each.clone(stop_token_ids=[stop]) for each, stop in zip(PARAMS, stops, strict=True)]
    cut = [tokens[: tokens.index(stop) + 1] for tokens, stop in zip(expected, stops, strict=True)]
    for _ in range(2):
        outputs = ahead.generate(PROMPTS, params)
        assert tokens_of(outputs) == cut
        assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    for prompt, tokens, wanted in zip(PROMPTS, cut, expected, strict=True):
        if len(wanted) > len(tokens):
            (output,) = ahead.generate(prompt + tokens, GREEDY.clone(max_tokens=len(wanted) - len(tokens)))
            assert output.outputs[0].token_ids == wanted[len(tokens) :]


# Whatever a request asks for comes out as it does from an engine that does not run ahead.

SAMPLED = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
ASKED: dict[str, SamplingParams] = {
    "seeded": SAMPLED.clone(n=3),
    "filtered": SAMPLED.clone(temperature=0.8, seed=4, top_k=20, top_p=0.9, min_p=0.01),
    "penalties": GREEDY.clone(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.4, n=2),
    "logit_bias": SAMPLED.clone(logit_bias={5: 4.0, 1: 6.0}, ignore_eos=False, min_tokens=9),
    "allowed": SAMPLED.clone(allowed_token_ids=[3, 50, 120, 121]),
    "bad_words": SAMPLED.clone(bad_words=["th", "on"], temperature=0.5),
    "stop": SAMPLED.clone(stop=["t", "on"], n=2, seed=11),
    "stop shown": SAMPLED.clone(stop=["e"], include_stop_str_in_output=True),
    "logprobs": SAMPLED.clone(logprobs=3, prompt_logprobs=2),
    "plain": GREEDY,
}


def plain(output: RequestOutput) -> list[Any]:
    """All of an output but the log-probabilities, which are compared with a tolerance."""
    return [(c.index, c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.outputs]


def logprobs_of(output: RequestOutput) -> list[Any]:
    listed = [found for found in output.prompt_logprobs or [] if found is not None]
    return listed + [found for completion in output.outputs for found in completion.logprobs or []]


@pytest.mark.parametrize("together", [False, True], ids=["each alone", "all together"])
def test_all_that_can_be_asked_for(ahead: Engine, behind: Engine, together: bool) -> None:
    prompts = [prompt_of(4 + 3 * i, seed=i) for i in range(len(ASKED))]
    batches = [list(range(len(ASKED)))] if together else [[i] for i in range(len(ASKED))]
    params = list(ASKED.values())
    for batch in batches:
        for _ in range(2):  # again with what the first has left in the prefix cache
            found, wanted = (
                each.generate([prompts[i] for i in batch], [params[i] for i in batch])
                for each in (ahead, behind)
            )
            assert [plain(output) for output in found] == [plain(output) for output in wanted]
            for one, other in zip(found, wanted, strict=True):
                pairs = list(zip(logprobs_of(one), logprobs_of(other), strict=True))
                for here, there in pairs:
                    assert {t: (p.rank, p.decoded_token) for t, p in here.items()} == {
                        t: (p.rank, p.decoded_token) for t, p in there.items()
                    }
                    # Another bucket may add up in another order.
                    np.testing.assert_allclose(
                        [p.logprob for p in here.values()], [p.logprob for p in there.values()], atol=1e-4
                    )


def test_the_comparison_is_of_something(behind: Engine) -> None:
    found = {
        name: behind.generate(prompt_of(4 + 3 * i, seed=i), params)[0]
        for i, (name, params) in enumerate(ASKED.items())
    }
    assert {c.finish_reason for c in found["stop"].outputs} == {"stop"}
    assert found["logit_bias"].outputs[0].finish_reason == "stop"
    assert len(logprobs_of(found["logprobs"])) == 4 + 3 * 8 - 1 + 24
    assert len({tuple(c.token_ids) for c in found["seeded"].outputs}) == 3


# The order of events.


def test_the_next_step_is_handed_over_before_the_last_is_fetched(
    ahead: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    watch(monkeypatch, ahead, lambda i: events.append(f"launch {i}"), lambda i: events.append(f"fetch {i}"))
    ahead.add_request("x", prompt_of(5), GREEDY.clone(max_tokens=20))
    flying = []
    while ahead.has_unfinished_requests:
        ahead.step()
        flying.append(in_flight(ahead))
    last = len(flying) - 2
    assert last == (19 if ahead.config.num_scheduler_steps == 1 else 5)  # of 20 tokens the first, 2 x 8 and 3
    wanted = ["launch 0"]
    for number in range(last):
        wanted += [f"launch {number + 1}", f"fetch {number}"]
    assert events == [*wanted, f"fetch {last}"]
    assert flying == [1] * (last + 1) + [0]


def test_without_running_ahead_nothing_is_under_way(behind: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above might see what is always so."""
    events: list[str] = []
    watch(monkeypatch, behind, lambda i: events.append(f"launch {i}"), lambda i: events.append(f"fetch {i}"))
    behind.add_request("x", prompt_of(5), GREEDY.clone(max_tokens=2))
    while behind.has_unfinished_requests:
        behind.step()
        assert in_flight(behind) == 0
    assert events == ["launch 0", "fetch 0", "launch 1", "fetch 1"]


def test_who_needs_its_tokens_on_the_host_waits_for_them(
    ahead: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias of the next token may depend on the last one: then no step is planned before that is known."""
    events: list[str] = []
    watch(monkeypatch, ahead, lambda i: events.append(f"launch {i}"), lambda i: events.append(f"fetch {i}"))
    ahead.generate(prompt_of(5), GREEDY.clone(bad_words=["th"], max_tokens=3))
    assert events == [f"{what} {i}" for i in range(3) for what in ("launch", "fetch")]


def test_one_token_a_step_and_the_first_at_most_one_step_later(ahead: Engine, behind: Engine) -> None:
    arrived: list[dict[str, int]] = []
    for engine in (behind, ahead):
        first: dict[str, int] = {}
        for i in (1, 2, 6):
            engine.add_request(str(i), PROMPTS[i], DELTA)
        for number in range(200):
            outputs = engine.step()
            assert len({output.request_id for output in outputs}) == len(outputs)
            for output in outputs:
                assert [len(c.token_ids) for c in output.outputs] == [1]
                first.setdefault(output.request_id, number)
            if not engine.has_unfinished_requests:
                break
        arrived.append(first)
    assert all(arrived[1][name] <= number + 1 for name, number in arrived[0].items())


def test_a_stream_brings_token_after_token(ahead: Engine, expected: list[list[int]]) -> None:
    parts = [output.outputs[0].token_ids for output in ahead.stream(PROMPTS[2], PARAMS[2])]
    assert parts == [[token] for token in expected[2]]


# Compilation.


def test_nothing_compiles_after_the_warm_up(expected: list[list[int]], compiled: list[str]) -> None:
    """Running ahead, swapping, forking, pinning, deadlines, failures, all kinds of sampling."""
    with sibling(async_scheduling=True, num_host_blocks=60, preemption_mode="swap", **FULL) as engine:
        engine.warm_up()
        core = core_of(engine)
        runner, space = core.runner, core.scheduler.space
        # Others may have compiled these before, but none that the warm-up does not know.
        assert set(runner._programs) == set(core.builder.programs)
        assert set(runner._small) == set(_SMALL_PROGRAMS)
        compiled.clear()
        engine.pin_prefix(PROMPTS[2], pin_id="pin", ttl=1e-3)
        assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected
        engine.generate([prompt_of(5 + i, seed=i) for i in range(len(ASKED))], list(ASKED.values()))
        engine.add_request("parent", PROMPTS[0], PARAMS[0], deadline=100.0, priority=1, tenant="x")
        for _ in range(4):
            engine.step()
        engine.fork("parent", "child", at=30, append_token_ids=[9])
        list(engine.stream(prompt_of(9), GREEDY))
        drain(engine)
        assert tokens_of(engine.generate(PROMPTS, PARAMS)) == expected
        stats = space.stats
        assert min(stats.swapped_out, stats.swapped_in, stats.demoted, stats.promoted, stats.copied) > 0
        assert compiled == []

"""best_of: more completions are generated than returned, and the most likely are those that are."""

from typing import Any

import pytest

from jaxpaged import Engine, RequestOutputKind, SamplingParams
from jaxpaged.errors import InvalidRequestError
from tests.engine.test_failures import Broken, break_step, fail
from tests.engine.tiny import drain, prompt_of

DRAWN = SamplingParams(temperature=1.5, seed=3, max_tokens=10, ignore_eos=True)
PROMPT = prompt_of(9)


def by_likelihood(
    engine: Engine, count: int, params: SamplingParams = DRAWN
) -> list[tuple[float, list[int]]]:
    """What ``n=count`` gives, best first."""
    (output,) = engine.generate(PROMPT, params.clone(n=count, best_of=None, logprobs=0))
    found = [(c.cumulative_logprob or 0.0, c.token_ids) for c in output.outputs]
    return sorted(found, reverse=True)


@pytest.mark.parametrize(("n", "best_of"), [(1, 2), (1, 6), (3, 6), (2, 12)])
def test_returns_the_most_likely_ones(engine: Engine, n: int, best_of: int) -> None:
    expected = by_likelihood(engine, best_of)
    (output,) = engine.generate(PROMPT, DRAWN.clone(n=n, best_of=best_of))
    assert [completion.token_ids for completion in output.outputs] == [tokens for _, tokens in expected[:n]]
    assert [completion.index for completion in output.outputs] == list(range(n))
    assert {completion.finish_reason for completion in output.outputs} == {"length"}
    for completion in output.outputs:
        assert completion.text
        assert completion.logprobs is None
        assert completion.cumulative_logprob is None


def test_log_probabilities_are_shown_to_who_asks(engine: Engine) -> None:
    expected = by_likelihood(engine, 5)
    (output,) = engine.generate(PROMPT, DRAWN.clone(n=2, best_of=5, logprobs=2, prompt_logprobs=1))
    totals = [completion.cumulative_logprob for completion in output.outputs]
    assert totals == pytest.approx([total for total, _ in expected[:2]])
    assert output.prompt_logprobs is not None
    for completion, total in zip(output.outputs, totals, strict=True):
        assert completion.logprobs is not None
        chosen = [
            found[t].logprob for found, t in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
        assert sum(chosen) == pytest.approx(total)


def test_completions_that_stop_are_ranked_by_what_they_have(engine: Engine) -> None:
    stop = by_likelihood(engine, 6)[0][1][4]
    params = DRAWN.clone(stop_token_ids=[stop])
    expected = by_likelihood(engine, 6, params)
    assert len({len(tokens) for _, tokens in expected}) > 1
    (output,) = engine.generate(PROMPT, params.clone(n=4, best_of=6))
    assert [completion.token_ids for completion in output.outputs] == [tokens for _, tokens in expected[:4]]
    assert output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_only_the_end_is_shown(engine: Engine, kind: RequestOutputKind) -> None:
    params = DRAWN.clone(best_of=4, output_kind=kind)
    expected = by_likelihood(engine, 4)[0][1]
    engine.add_request("x", PROMPT, params)
    shown = []
    while engine.has_unfinished_requests:
        shown += engine.step()
    streamed = list(engine.stream(PROMPT, params))
    for (output,) in (shown, streamed):
        assert output.finished
        assert [completion.token_ids for completion in output.outputs] == [expected]


def test_as_many_as_are_returned_is_nothing_special(engine: Engine) -> None:
    params = DRAWN.clone(n=3, best_of=3)
    (output,) = engine.generate(PROMPT, params)
    (plain,) = engine.generate(PROMPT, DRAWN.clone(n=3))
    assert [c.token_ids for c in output.outputs] == [c.token_ids for c in plain.outputs]
    assert len(list(engine.stream(PROMPT, params))) > 1


def test_what_was_cut_short_comes_last(engine: Engine) -> None:
    """In the second output a completion that had hardly begun would be the most likely one."""
    stop = by_likelihood(engine, 3)[1][1][5]
    engine.add_request("x", PROMPT, DRAWN.clone(n=2, best_of=3, max_tokens=60, stop_token_ids=[stop]))
    while True:
        engine.step()
        (tables,) = engine.block_tables().values()
        if not all(tables):
            break
    engine.abort_request("x")
    (output,) = engine.step()
    assert [completion.finish_reason for completion in output.outputs] == ["stop", "abort"]
    engine.add_request("y", PROMPT, DRAWN.clone(best_of=8, max_tokens=60))
    engine.add_request("z", PROMPT, DRAWN.clone(best_of=8, max_tokens=60))
    engine.step()
    engine.step()
    engine.abort_request("y")
    engine.abort_request("z")
    first, second = engine.step()
    assert len(first.outputs[0].token_ids) > 0
    assert len(second.outputs) == 1


def test_a_failure_shows_its_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add_request("x", PROMPT, DRAWN.clone(n=2, best_of=4))
    for _ in range(4):
        engine.step()
    break_step(monkeypatch, engine, fail)
    output = drain(engine)["x"]
    assert isinstance(output.error, Broken)
    assert [completion.finish_reason for completion in output.outputs] == ["error", "error"]


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 2.0}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"best_of": 2, "temperature": 0.0}, "best_of"),
        ({"n": 2, "best_of": 2, "temperature": 0.0}, "best_of"),
    ],
)
def test_refuses_what_selects_nothing(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**options)
    assert error.value.argument == argument


def test_one_of_one_may_be_greedy() -> None:
    assert SamplingParams(best_of=1, temperature=0.0).num_completions == 1
    assert SamplingParams(n=2).num_completions == 2
    assert SamplingParams(n=2, best_of=5).num_completions == 5

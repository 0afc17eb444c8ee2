"""Log-probabilities are those of a full forward pass, for outputs and prompts, in whatever pieces they came."""

from typing import Any

import numpy as np
import pytest

from jaxpaged import Engine, Logprob, SamplingParams
from tests.engine.tiny import GREEDY, dense_logprobs, prompt_of

TOLERANCE = 1e-4
SAMPLED = SamplingParams(temperature=1.3, top_k=50, seed=5, max_tokens=16, ignore_eos=True)


def check(found: dict[int, Logprob], token: int, reference: np.ndarray, count: int) -> None:
    """One token's candidates against the log-probabilities [V] of the reference."""
    order = np.argsort(-reference, kind="stable")
    assert set(found) == {token, *order[:count].tolist()}
    for token_id, candidate in found.items():
        assert candidate.logprob == pytest.approx(reference[token_id], abs=TOLERANCE)
        assert order[candidate.rank - 1] == token_id


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_logprobs_of_the_output(engine: Engine, params: SamplingParams, count: int) -> None:
    prompts = [prompt_of(length) for length in (37, 4, 18)]
    outputs = engine.generate(prompts, params.clone(logprobs=count, n=2))
    for prompt, output in zip(prompts, outputs, strict=True):
        for completion in output.outputs:
            reference = dense_logprobs([*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
            assert completion.logprobs is not None
            assert len(completion.logprobs) == len(completion.token_ids) == 16
            for found, token, row in zip(completion.logprobs, completion.token_ids, reference, strict=True):
                check(found, token, row, count)
            total = sum(row[token] for token, row in zip(completion.token_ids, reference, strict=True))
            assert completion.cumulative_logprob == pytest.approx(total, abs=16 * TOLERANCE)


def test_logprobs_across_preemption(engine: Engine) -> None:
    prompts = [prompt_of(12, seed=i) for i in range(8)]
    outputs = engine.generate(prompts, GREEDY.clone(logprobs=1, prompt_logprobs=1, max_tokens=30))
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        (completion,) = output.outputs
        reference = dense_logprobs([*prompt, *completion.token_ids])
        assert completion.logprobs is not None
        assert output.prompt_logprobs is not None
        assert len(completion.logprobs) == 30
        assert len(output.prompt_logprobs) == 12
        found = [*output.prompt_logprobs[1:], *completion.logprobs]
        for each, token, row in zip(found, [*prompt[1:], *completion.token_ids], reference[:-1], strict=True):
            assert each is not None
            check(each, token, row, 1)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 16, 45])
def test_logprobs_of_the_prompt(engine: Engine, length: int, n: int) -> None:
    """Chunked, alone and beside others, and again when the prompt is in the prefix cache."""
    prompt = prompt_of(length)
    reference = dense_logprobs(prompt)
    beside = GREEDY.clone(max_tokens=5)
    for _ in range(2):
        _, output, _ = engine.generate(
            [prompt_of(5), prompt, prompt_of(7)],
            [beside, GREEDY.clone(prompt_logprobs=4, n=n, max_tokens=3), beside],
        )
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == length
        assert output.prompt_logprobs[0] is None
        for found, token, row in zip(output.prompt_logprobs[1:], prompt[1:], reference, strict=False):
            assert found is not None
            check(found, token, row, 4)


def test_no_logprobs_unless_asked_for(engine: Engine) -> None:
    quiet, loud = engine.generate([prompt_of(5)] * 2, [GREEDY, GREEDY.clone(logprobs=-1, prompt_logprobs=-1)])
    assert quiet.prompt_logprobs is None
    assert quiet.outputs[0].logprobs is None
    assert quiet.outputs[0].cumulative_logprob is None
    assert loud.outputs[0].logprobs is not None
    assert loud.prompt_logprobs is not None
    for found in (*loud.outputs[0].logprobs, *loud.prompt_logprobs[1:]):  # -1: all that the engine offers
        assert found is not None
        assert len(found) in (20, 21)


def test_candidates_carry_their_text(engine: Engine) -> None:
    params = GREEDY.clone(logprobs=2, max_tokens=4)
    (output,) = engine.generate(prompt_of(5), params)
    (silent,) = engine.generate(prompt_of(5), params.clone(detokenize=False))

    def texts(found: Any) -> list[str | None]:
        return [candidate.decoded_token for each in found for candidate in each.values()]

    assert all(isinstance(text, str) for text in texts(output.outputs[0].logprobs))
    assert set(texts(silent.outputs[0].logprobs)) == {None}

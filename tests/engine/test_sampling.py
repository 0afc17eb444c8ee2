"""Sampling in the engine: seeds, rules and stops, and that what one request turns on changes no other."""

from typing import Any

import numpy as np
import pytest

from jaxpaged import Engine, SamplingParams
from tests.engine.tiny import EOS, GREEDY, VOCAB_SIZE, dense_greedy, dense_logprobs, drain, prompt_of
from tests.text.tokenizers_made_here import byte_level

SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=30, ignore_eos=True)
PROMPT = prompt_of(21)


def tokens(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    return engine.generate(prompt, params)[0].outputs[0].token_ids


def test_a_seed_fixes_the_text_whatever_else_runs(engine: Engine) -> None:
    alone = tokens(engine, PROMPT, SAMPLED)
    assert len(set(alone)) > 10
    assert tokens(engine, PROMPT, SAMPLED.clone(seed=8)) != alone
    before = engine.stats().num_preemptions
    others = [prompt_of(9 + i, seed=i) for i in range(7)]
    for place in (0, 3, 7):  # other rows, other chunks of the prompt, preempted or not
        prompts = [*others[:place], PROMPT, *others[place:]]
        params = [SAMPLED.clone(seed=i, temperature=0.5 + i, top_k=i, top_p=1.0) for i in range(8)]
        params[place] = SAMPLED
        assert engine.generate(prompts, params)[place].outputs[0].token_ids == alone
    assert engine.stats().num_preemptions > before


def test_a_preempted_request_draws_the_same(engine: Engine) -> None:
    params = [SAMPLED.clone(seed=i, repetition_penalty=1.3) for i in range(8)]
    prompts = [prompt_of(15, seed=i) for i in range(8)]
    alone = [tokens(engine, prompt, each) for prompt, each in zip(prompts, params, strict=True)]
    engine.reset_prefix_cache()
    outputs = engine.generate(prompts, params)
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0
    assert [output.outputs[0].token_ids for output in outputs] == alone


def test_completions_draw_differently(engine: Engine) -> None:
    (output,) = engine.generate(PROMPT, SAMPLED.clone(n=4))
    found = [tuple(completion.token_ids) for completion in output.outputs]
    assert len(set(found)) == 4
    assert list(found[0]) == tokens(engine, PROMPT, SAMPLED)
    (again,) = engine.generate(PROMPT, SAMPLED.clone(n=4))
    assert [tuple(completion.token_ids) for completion in again.outputs] == found


def test_without_a_seed_each_request_draws_anew(engine: Engine) -> None:
    outputs = engine.generate([PROMPT] * 3, SAMPLED.clone(seed=None, n=2))
    assert len({tuple(c.token_ids) for output in outputs for c in output.outputs}) == 6


FEATURES: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "sampled": {"temperature": 1.0, "seed": 3},
    "filters": {"temperature": 1.0, "seed": 3, "top_k": 10, "top_p": 0.5, "min_p": 0.05},
    "penalties": {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5},
    "logit_bias": {"logit_bias": {5: 100.0, 6: -100.0}},
    "allowed": {"allowed_token_ids": [10, 20, 30]},
    "bad_words": {"bad_words": ["the", " cat"]},
    "min_tokens": {"min_tokens": 8},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_what_one_request_turns_on_changes_no_bit_of_another(engine: Engine, feature: str) -> None:
    others = [
        (prompt_of(6), GREEDY.clone(logprobs=2)),
        (prompt_of(5), SAMPLED.clone(max_tokens=16, logprobs=2)),
    ]

    def run(params: SamplingParams) -> list[Any]:
        engine.reset_prefix_cache()
        prompts = [*(prompt for prompt, _ in others), prompt_of(5, seed=1)]
        outputs = engine.generate(prompts, [*(each for _, each in others), params])
        return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs[:2]]

    assert run(GREEDY.clone(**FEATURES[feature])) == run(GREEDY)


def penalised(
    prompt: list[int], count: int, repetition: float, presence: float, frequency: float
) -> list[int]:
    """Greedy tokens with penalties, worked out from full forward passes."""
    output: list[int] = []
    for _ in range(count):
        # Penalties see logits, which log-probabilities are not; so the model's own are used.
        logits = raw_logits([*prompt, *output])
        counts = np.bincount(output, minlength=VOCAB_SIZE)
        seen = (counts > 0) | (np.bincount(prompt, minlength=VOCAB_SIZE) > 0)
        scaled = np.where(logits > 0, logits / repetition, logits * repetition)
        logits = np.where(seen, scaled, logits) - frequency * counts - presence * (counts > 0)
        output.append(int(logits.argmax()))
    return output


def raw_logits(tokens: list[int]) -> np.ndarray:
    from tests.engine.tiny import tiny_decoder

    padded = np.zeros(128, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(tiny_decoder()(padded))[len(tokens) - 1]


def test_penalties_across_preemption_and_chunks(engine: Engine) -> None:
    prompt = prompt_of(24) + prompt_of(24)[:8]
    params = GREEDY.clone(repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.3)
    wanted = penalised(prompt, 16, 1.4, 0.6, 0.3)
    assert wanted != dense_greedy(prompt, 16)
    outputs = engine.generate([prompt, *(prompt_of(20, seed=i) for i in range(6)), prompt], params.clone(n=2))
    for output in (outputs[0], outputs[-1]):
        assert [completion.token_ids for completion in output.outputs] == [wanted] * 2
    assert sum(output.metrics.num_preemptions for output in outputs if output.metrics) > 0


def test_logit_bias_and_allowed_ids(engine: Engine) -> None:
    assert tokens(engine, PROMPT, GREEDY.clone(logit_bias={77: 100.0})) == [77] * 16
    first = dense_greedy(PROMPT, 1)[0]
    assert first not in tokens(engine, PROMPT, GREEDY.clone(logit_bias={first: -100.0}))
    allowed = [3, 50, 120]
    found = tokens(engine, PROMPT, SAMPLED.clone(allowed_token_ids=allowed, top_p=1.0))
    assert set(found) == set(allowed)
    best = dense_logprobs(PROMPT)[-1][allowed].argmax()
    assert tokens(engine, PROMPT, GREEDY.clone(allowed_token_ids=allowed))[0] == allowed[int(best)]


def test_bad_words_of_one_and_several_tokens(engine: Engine) -> None:
    free = tokens(engine, PROMPT, GREEDY)
    tokenizer = byte_level()
    for length in (1, 2):
        text = tokenizer.decode(free[4 : 4 + length], skip_special_tokens=False)
        word = tokenizer.encode(text, add_special_tokens=False)
        found = tokens(engine, PROMPT, GREEDY.clone(bad_words=[text], max_tokens=40))
        joined = [found[i : i + len(word)] for i in range(len(found))]
        assert word not in joined


def test_eos_ignored_and_held_back(engine: Engine) -> None:
    always = GREEDY.clone(logit_bias={EOS: 100.0}, ignore_eos=False)
    (output,) = engine.generate(PROMPT, always)
    assert output.outputs[0].token_ids == [EOS]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    assert tokens(engine, PROMPT, always.clone(ignore_eos=True)) == [EOS] * 16
    found = tokens(engine, PROMPT, always.clone(min_tokens=5))
    assert len(found) == 6
    assert found[-1] == EOS
    assert EOS not in found[:5]
    (output,) = engine.generate(PROMPT, always.clone(min_tokens=16))
    assert output.outputs[0].finish_reason == "length"


def test_stop_token_ids(engine: Engine) -> None:
    free = tokens(engine, PROMPT, GREEDY)
    stop = free[6]
    end = free.index(stop) + 1
    (output,) = engine.generate(PROMPT, GREEDY.clone(stop_token_ids=[stop, 2]))
    assert output.outputs[0].token_ids == free[:end]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    found = tokens(engine, PROMPT, GREEDY.clone(stop_token_ids=[stop], min_tokens=end))
    assert len(found) > end
    assert stop not in found[:end]


def test_stop_strings_end_each_completion_on_its_own(engine: Engine) -> None:
    params = SAMPLED.clone(n=4, max_tokens=40)
    (free,) = engine.generate(PROMPT, params)
    stop = free.outputs[1].text[6:8]
    (output,) = engine.generate(PROMPT, params.clone(stop=[stop]))
    for whole, cut in zip(free.outputs, output.outputs, strict=True):
        assert cut.text == whole.text.split(stop)[0]
        assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
        if stop in whole.text:
            assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        else:
            assert (cut.finish_reason, cut.stop_reason) == ("length", None)
    assert output.outputs[1].finish_reason == "stop"
    (shown,) = engine.generate(PROMPT, params.clone(stop=[stop], include_stop_str_in_output=True))
    assert shown.outputs[1].text == output.outputs[1].text + stop


def test_a_seeded_request_streams_what_it_generates(engine: Engine) -> None:
    engine.add_request("noise", prompt_of(30), GREEDY.clone(max_tokens=20, n=2))
    parts = [part.outputs[0] for part in engine.stream(PROMPT, SAMPLED)]
    noise = drain(engine)["noise"]
    (whole,) = engine.generate(PROMPT, SAMPLED)
    assert "".join(part.text for part in parts) == whole.outputs[0].text
    assert [token for part in parts for token in part.token_ids] == whole.outputs[0].token_ids
    assert [c.token_ids for c in noise.outputs] == [dense_greedy(prompt_of(30), 20)] * 2

"""The device sampler against the sort-based reference, and against itself in other company."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxpaged.sampling_params import SamplingParams
from tests.sampling import reference
from tests.sampling.step import MAX_LOGPROBS, Request, bias_of, compiled_sample, draws, sample_step

VOCAB = 50


@st.composite
def requests(draw: st.DrawFn) -> Request:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = (draw(st.sampled_from([0.3, 2.0, 8.0])) * rng.normal(size=VOCAB)).astype(np.float32)
    if draw(st.booleans()):  # ties
        logits = np.round(logits)
    if draw(st.booleans()):
        logits[rng.random(VOCAB) < 0.3] = -np.inf
        logits[7] = 0.5
    ids = st.lists(st.integers(0, VOCAB - 1), max_size=8)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        top_k=draw(st.sampled_from([0, 1, 3, 20, VOCAB, 1000])),
        top_p=draw(st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, -0.7])),
        logit_bias=draw(st.none() | st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3)),
        allowed_token_ids=draw(st.none() | st.just([1, 2, 7, 30])),
        logprobs=draw(st.sampled_from([None, 0, 3])),
    )
    return Request(
        logits, params, draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**20)), draw(ids), draw(ids)
    )


def adjusted(request: Request) -> np.ndarray:
    return reference.adjusted_logits(
        request.logits, request.params, request.prompt, request.output, bias_of(request)
    )


def test_frequencies_follow_the_distribution() -> None:
    rng = np.random.default_rng(1)
    for params in (
        SamplingParams(),
        SamplingParams(temperature=0.6, top_k=12),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.05, top_p=0.95, top_k=30, temperature=1.3),
    ):
        request = Request((2 * rng.normal(size=VOCAB)).astype(np.float32), params, seed=11)
        expected = reference.distribution(request.logits, params)
        counts = np.bincount(draws(request, 8192), minlength=VOCAB)
        assert not counts[expected == 0].any()
        cosine = counts @ expected / np.linalg.norm(counts) / np.linalg.norm(expected)
        assert cosine > 0.99
        # And in detail: Pearson's statistic of the counts, which is about chi-squared.
        likely = expected * 8192 > 5
        statistic = ((counts - expected * 8192)[likely] ** 2 / (expected * 8192)[likely]).sum()
        assert statistic < likely.sum() + 5 * np.sqrt(2 * likely.sum())


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 100, 4096, 5000, 50257])
def test_draws_reach_every_part_of_any_vocabulary(vocab_size: int) -> None:
    logits = np.zeros(vocab_size, np.float32)
    tokens = draws(Request(logits, SamplingParams()), 512)
    assert tokens.min() >= 0
    assert tokens.max() < vocab_size
    quarters = np.bincount(tokens * 4 // vocab_size, minlength=4)
    if vocab_size >= 63:
        assert (abs(quarters - 128) < 60).all()


@given(requests())
def test_tokens_come_from_the_reference_distribution(request: Request) -> None:
    logits = adjusted(request)
    assume(reference.boundary_gap(logits, request.params) > 1e-5)
    probabilities = reference.distribution(logits, request.params)
    same = [
        Request(request.logits, request.params, seed, 5, request.prompt, request.output) for seed in range(16)
    ]
    tokens = sample_step(same).tokens
    assert (probabilities[tokens] > 0).all()
    if request.params.is_greedy:
        assert (tokens == np.argmax(logits)).all()


@given(st.lists(requests(), min_size=6, max_size=6), st.permutations(range(1, 9)))
@settings(max_examples=50)
def test_a_request_gets_the_same_in_any_company_row_and_bucket(
    mixed: list[Request], engine_rows: list[int]
) -> None:
    together = sample_step(mixed, engine_rows=engine_rows[:6], num_rows=9, batch_size=16)
    for place, request in enumerate(mixed):
        alone = sample_step([request], num_rows=9)
        assert alone.tokens[0] == together.tokens[place]
        if request.params.logprobs is not None:
            np.testing.assert_allclose(alone.logprob[0], together.logprob[place], rtol=1e-5)
            assert alone.rank[0] == together.rank[place]


def test_seed_and_position_decide_the_draw() -> None:
    logits = np.zeros(VOCAB, np.float32)
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1, -2]
    sequences = {tuple(draws(Request(logits, SamplingParams(), seed), 32).tolist()) for seed in seeds}
    assert len(sequences) == len(seeds)
    assert tuple(draws(Request(logits, SamplingParams(), 1), 32).tolist()) in sequences
    # -1 and 2**64 - 1 are the same 64 bits.
    np.testing.assert_array_equal(
        draws(Request(logits, SamplingParams(), -1), 32),
        draws(Request(logits, SamplingParams(), 2**64 - 1), 32),
    )


def test_greedy_takes_the_lowest_id_of_equals_and_survives_nan() -> None:
    rows = np.zeros((7, 300), np.float32)
    rows[0, [170, 171, 299]] = 4.0
    rows[1] = -np.inf
    rows[2, 3] = np.nan
    rows[2, 200] = 1.0
    rows[3] = np.nan
    rows[4, [5, 9]] = np.inf
    rows[5] = -1e30
    rows[5, 299] = -1e29
    greedy = SamplingParams(temperature=0.0)
    tokens = sample_step([Request(row, greedy) for row in rows]).tokens
    assert tokens.tolist() == [170, 0, 200, 0, 5, 299, 0]
    drawn = sample_step([Request(row, SamplingParams(logprobs=2)) for row in rows])
    assert drawn.tokens[1] == 0
    assert drawn.tokens[3] == 0
    assert drawn.tokens[4] in (5, 9)
    assert drawn.tokens[5] == 299
    assert ((drawn.tokens >= 0) & (drawn.tokens < 300)).all()


def test_banned_and_disallowed_tokens_are_never_drawn() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[3] = 50.0
    params = SamplingParams(allowed_token_ids=[4, 9], logit_bias={4: 1.0}, repetition_penalty=1.5)
    tokens = sample_step([Request(logits, params, seed) for seed in range(64)]).tokens
    assert set(tokens.tolist()) == {4, 9}


def test_penalties_count_the_tokens_sampled_on_the_device() -> None:
    import jax

    from jaxpaged import sampler
    from jaxpaged.sampling_rows import SamplingTable

    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    table = SamplingTable(3)
    table.set(2, params, 0)
    state = sampler.init_sampler_state(3, VOCAB)
    logits = np.zeros((2, VOCAB), np.float32)
    logits[:, 8], logits[:, 30] = 2.5, 1.0
    seen = []
    for position in range(6):
        batch = table.batch(np.array([2, 0], np.int32), np.full(2, position, np.int32))
        output, state = compiled_sample(logits, state, batch, max_logprobs=MAX_LOGPROBS)
        seen.append(int(output.tokens[0]))
        assert output.tokens[1] == 8  # padding has no penalty, whatever was counted for it
    assert seen == [8, 8, 30, 8, 0, 1]  # 2.5, 1.5, then 1.0 > 0.5, 0.5, and zeros
    assert jax.device_get(state.output_counts)[1].sum() == 0


def test_logprobs_raw_and_processed() -> None:
    rng = np.random.default_rng(3)
    logits = (3 * rng.normal(size=VOCAB)).astype(np.float32)
    params = SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.4, logprobs=MAX_LOGPROBS)
    request = Request(logits, params, seed=4, prompt=[1, 2, 3, 40])
    raw = sample_step([request, Request(logits, SamplingParams(temperature=0.0))])
    token = raw.tokens[0]
    expected = reference.log_softmax(logits)
    np.testing.assert_allclose(raw.logprob[0], expected[token], rtol=1e-5)
    assert raw.rank[0] == (expected > expected[token]).sum() + 1
    best = np.argsort(-expected, kind="stable")[:MAX_LOGPROBS]
    assert raw.top_ids[0].tolist() == best.tolist()
    np.testing.assert_allclose(raw.top_logprobs[0], expected[best], rtol=1e-5)

    processed = sample_step([request], logprobs_mode="processed_logprobs")
    probabilities = reference.distribution(adjusted(request), params)
    assert processed.tokens[0] == token
    np.testing.assert_allclose(processed.logprob[0], np.log(probabilities[token]), rtol=1e-4)
    best = np.argsort(-probabilities, kind="stable")[:MAX_LOGPROBS]
    assert processed.top_ids[0].tolist() == best.tolist()
    np.testing.assert_allclose(processed.top_logprobs[0], np.log(probabilities[best]), rtol=1e-4)


def test_more_logprobs_than_tokens() -> None:
    output = sample_step([Request(np.array([1.0, 0.0], np.float32), SamplingParams(logprobs=5))])
    assert output.top_ids.shape == (1, MAX_LOGPROBS)
    assert np.isneginf(output.top_logprobs[0, 2:]).all()


def test_no_mix_of_parameters_compiles_anew() -> None:
    logits = np.zeros(VOCAB, np.float32)
    mixes = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.5, min_p=0.1),
        SamplingParams(repetition_penalty=1.1, logit_bias={1: 2.0}),
        SamplingParams(logprobs=0),
        SamplingParams(logprobs=5, allowed_token_ids=[1]),
    ]
    sample_step([Request(logits, mixes[0])] * 3, num_rows=8)
    before = compiled_sample._cache_size()
    for params in mixes:
        sample_step([Request(logits, params)] * 3, num_rows=8)
    assert compiled_sample._cache_size() == before

"""The engine on a GPU: its output does not depend on how a request got there, as far as bfloat16 allows.

Matrix products of different sizes round differently, so in bfloat16 two ways to the same token may part, but only
where two tokens are as good as equally likely. What can be said for every token is that its log-probability is
that of the other attention, and of a plain forward pass, within the rounding that plain JAX shows as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxpaged import Engine, RequestOutput, SamplingParams
from tests.engine.tiny import CONFIG, dense_greedy, dense_logprobs, drain, prompt_of, tiny_decoder, tokens_of

pytestmark = pytest.mark.gpu

WIDE = replace(CONFIG, hidden_size=256, intermediate_size=512, head_dim=64)
SIZES: dict[str, Any] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "block_size": 16,
    "num_blocks": 24,  # 23 of 16 tokens: a few long requests do not fit together
    "max_model_len": 128,
    "num_scheduler_steps": 1,
}
LENGTHS = [(70, 40), (3, 50), (37, 45), (65, 30), (16, 60), (15, 40), (1, 40), (33, 50)]  # prompt, output
PROMPTS = [prompt_of(length, seed) for seed, (length, _) in enumerate(LENGTHS)]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=0) for _, count in LENGTHS
]


def new_engine(attention: str, dtype: str = "bfloat16", **arguments: Any) -> Engine:
    model = tiny_decoder(WIDE, dtype)
    return Engine(model, **{**SIZES, "attention": attention, "dtype": dtype, **arguments})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with new_engine("mosaic_gpu") as found:
        yield found


def chosen(output: RequestOutput) -> np.ndarray:
    """Log-probability of each token of the output."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    pairs = zip(completion.logprobs, completion.token_ids, strict=True)
    return np.array([found[token].logprob for found, token in pairs])


def dense(prompt: Sequence[int], output: RequestOutput) -> np.ndarray:
    """float32 log-probabilities of all tokens ``[outputs, V]``, of the same bfloat16 weights."""
    tokens = output.outputs[0].token_ids
    return dense_logprobs([*prompt, *tokens[:-1]], tiny_decoder(WIDE, "bfloat16"))[len(prompt) - 1 :]


def rounding(outputs: Sequence[RequestOutput]) -> float:
    """How far log-probabilities are from those of the forward pass, at most."""
    errors = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        reference = dense(prompt, output)
        own = reference[np.arange(len(reference)), output.outputs[0].token_ids]
        errors.append(np.abs(chosen(output) - own).max())
    return float(max(errors))


@pytest.fixture(scope="module")
def allowed() -> float:
    """Twice what plain JAX's attention in the same engine differs by from the forward pass."""
    with new_engine("xla") as plain:
        return 2 * rounding(plain.generate(PROMPTS, PARAMS)) + 1e-3


def check(outputs: Sequence[RequestOutput], allowed: float) -> None:
    """Every token is a most likely one, and its log-probability is right."""
    assert rounding(outputs) <= allowed
    for prompt, output, (_, count) in zip(PROMPTS, outputs, LENGTHS, strict=True):
        tokens, reference = output.outputs[0].token_ids, dense(prompt, output)
        assert len(tokens) == count
        missed = reference.max(axis=-1) - reference[np.arange(count), tokens]
        assert missed.max() <= 2 * allowed, "both the token's logit and the best one's are rounded"


def test_rounding_is_small(allowed: float) -> None:
    """Else the tests below would prove little."""
    assert allowed < 0.5


def test_alone_and_chunked(engine: Engine, allowed: float) -> None:
    outputs = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        engine.reset_prefix_cache()
        outputs += engine.generate(prompt, params)
    check(outputs, allowed)


def test_batched_and_preempted(engine: Engine, allowed: float) -> None:
    engine.reset_prefix_cache()
    before = engine.stats().num_preemptions
    check(engine.generate(PROMPTS, PARAMS), allowed)
    assert engine.stats().num_preemptions > before


def test_cache_hits(engine: Engine, allowed: float) -> None:
    engine.reset_prefix_cache()
    outputs = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        engine.generate(prompt, params.clone(max_tokens=1))
        (output,) = engine.generate(prompt, params)
        assert output.num_cached_tokens == (len(prompt) - 1) // 16 * 16
        outputs.append(output)
    check(outputs, allowed)


def test_the_same_run_gives_the_same_tokens(engine: Engine) -> None:
    """Nothing in a step depends on which thread block is first."""
    runs = []
    for _ in range(2):
        engine.reset_prefix_cache()
        outputs = engine.generate(PROMPTS, PARAMS)
        runs.append((tokens_of(outputs), [chosen(output).tolist() for output in outputs]))
    assert runs[0] == runs[1]


def test_forks_agree(engine: Engine) -> None:
    """Completions of one prompt share its blocks, and each copies the one it writes to."""
    engine.reset_prefix_cache()
    before = engine.stats().blocks_copied
    engine.add_request("fork", PROMPTS[0], PARAMS[0].clone(n=3))
    completions = drain(engine)["fork"].outputs
    assert engine.stats().blocks_copied > before
    assert len(completions) == 3
    assert [c.token_ids for c in completions[1:]] == [completions[0].token_ids] * 2


def test_a_given_text_has_the_same_logprobs_with_either_attention(engine: Engine, allowed: float) -> None:
    """Token by token, on one text: nothing parts here."""
    text = prompt_of(120, 7)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found = []
    with new_engine("xla") as plain:
        for each in (engine, plain):
            (output,) = each.generate(text, params)
            assert output.prompt_logprobs is not None
            pairs = zip(output.prompt_logprobs[1:], text[1:], strict=True)
            found.append([logprobs[token].logprob for logprobs, token in pairs if logprobs])
    assert len(found[0]) == 119
    np.testing.assert_allclose(found[0], found[1], atol=allowed, rtol=0)


@pytest.fixture
def exact_products() -> Iterator[None]:
    """float32 products as exact as a CPU's: the default on a GPU rounds their inputs."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.usefixtures("exact_products")
def test_in_float32_tokens_are_the_same_however_a_request_runs() -> None:
    """With plain JAX's attention: the engine's own part, on this device."""
    expected = [dense_greedy(prompt, 20) for prompt in PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    with Engine(tiny_decoder(), **{**SIZES, "attention": "xla", "num_blocks": 16}) as engine:
        assert tokens_of(engine.generate(PROMPTS, params)) == expected
        assert engine.stats().num_preemptions > 0
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            assert tokens_of(engine.generate(prompt, params)) == [tokens]

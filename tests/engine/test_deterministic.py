"""deterministic=True: the bits of a request's tokens and log-probabilities depend on the request alone.

One engine runs requests by themselves, one token a step. Another has the same requests among others, in chunks,
preempted, out of the prefix cache, several decode steps at a time. What they return is compared without any tolerance;
and that the same comparison fails without the argument is tested as well.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from jaxpaged import Engine, RequestOutput, SamplingParams
from jaxpaged.config import EngineConfig
from jaxpaged.errors import InvalidRequestError
from tests.engine.tiny import CONFIG, idle, prompt_of, tiny_decoder

STEPS = 4
ALONE: dict[str, Any] = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "num_scheduler_steps": 1}
COMPANY: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "num_scheduler_steps": STEPS}
# 140 tokens: a few long requests do not fit together.
SIZES: dict[str, Any] = {"block_size": 4, "num_blocks": 36, "max_model_len": 128}

# Sums long enough for their order to show.
WIDE = replace(CONFIG, hidden_size=256, intermediate_size=1024)

NEEDLES = [(21, 24), (1, 40), (50, 20)]  # prompt and output tokens
PARAMS = [
    SamplingParams(temperature=0.8, seed=5, logprobs=3),
    SamplingParams(temperature=0.0, logprobs=1, repetition_penalty=1.2),
    SamplingParams(temperature=1.2, seed=7, top_p=0.9, logprobs=0, prompt_logprobs=2),
]
PROMPTS = [prompt_of(length, seed) for seed, (length, _) in enumerate(NEEDLES)]


def params_of(needle: int) -> SamplingParams:
    return PARAMS[needle].clone(max_tokens=NEEDLES[needle][1], ignore_eos=True)


def new_engine(
    dtype: str, sizes: dict[str, Any], buckets: tuple[int, ...], *, deterministic: bool = True
) -> Engine:
    """An engine of few buckets: programs are what costs time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineConfig, "buckets", property(lambda self: buckets))
        return Engine(tiny_decoder(WIDE, dtype), deterministic=deterministic, **{**SIZES, **sizes})


def returned(output: RequestOutput) -> tuple[Any, Any]:
    """All that must not change: tokens, log-probabilities, ranks and alternatives, of output and prompt."""
    return output.outputs, output.prompt_logprobs


def company(rng: random.Random) -> tuple[list[list[int]], list[SamplingParams]]:
    """Between one and ten other requests of all kinds."""
    prompts, params = [], []
    for i in range(rng.choice([1, 3, 6, 10])):
        prompts.append(prompt_of(rng.randint(1, 60), 100 + i))
        params.append(
            SamplingParams(
                temperature=rng.choice([0.0, 1.0]),
                top_k=rng.choice([0, 5]),
                seed=i,
                presence_penalty=rng.choice([0.0, 1.0]),
                logprobs=rng.choice([None, 2]),
                max_tokens=rng.randint(1, 40),
                ignore_eos=True,
            )
        )
    return prompts, params


def among_others(engine: Engine, needle: int, seed: int) -> RequestOutput:
    rng = random.Random(seed)
    prompts, params = company(rng)
    place = rng.randint(0, len(prompts))
    prompts.insert(place, PROMPTS[needle])
    params.insert(place, params_of(needle))
    return engine.generate(prompts, params)[place]


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    with new_engine("float32", ALONE, (1,)) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(alone: Engine) -> list[tuple[Any, Any]]:
    return [returned(alone.generate(PROMPTS[i], params_of(i))[0]) for i in range(len(NEEDLES))]


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    with new_engine("float32", COMPANY, (8, 40)) as engine:  # one tile of rows, and three
        yield engine


@pytest.fixture
def together(shared: Engine) -> Iterator[Engine]:
    with idle(shared) as engine:
        yield engine


def test_needles_among_others(together: Engine, expected: list[tuple[Any, Any]]) -> None:
    """At random places among random others; whoever comes late is preempted where the pool is too small."""
    preempted = 0
    for seed in range(12):
        together.reset_prefix_cache()
        needle = seed % len(NEEDLES)
        output = among_others(together, needle, seed)
        assert returned(output) == expected[needle]
        assert output.metrics is not None
        preempted += output.metrics.num_preemptions
    assert preempted > 0


def test_chunks_and_prefix_hits(together: Engine, expected: list[tuple[Any, Any]]) -> None:
    for i, prompt in enumerate(PROMPTS):
        params = params_of(i).clone(prompt_logprobs=None)
        for run in range(2):
            (output,) = together.generate(prompt, params)
            assert output.outputs == expected[i][0]
            assert (output.num_cached_tokens or 0) == (run * ((len(prompt) - 1) // 4 * 4))


def test_several_steps_in_one_program(alone: Engine, together: Engine) -> None:
    """What they leave in the pool, which the next request finds there, has the bits of single steps."""
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=34, ignore_eos=True)
    together.add_request("x", PROMPTS[0], params)
    num_programs = 0
    while together.has_unfinished_requests:
        (last,) = together.step()
        num_programs += 1
    assert num_programs < 4 + 34 / STEPS
    assert last.outputs == alone.generate(PROMPTS[0], params)[0].outputs
    text = PROMPTS[0] + last.outputs[0].token_ids
    alone.reset_prefix_cache()
    output, expected = (
        engine.generate(text, params.clone(logprobs=5, max_tokens=3))[0] for engine in (together, alone)
    )
    assert (output.num_cached_tokens, expected.num_cached_tokens) == (52, 0)
    assert returned(output) == returned(expected)


def num_different(dtype: str, *, deterministic: bool) -> int:
    """How many of six requests return other bits among others than alone."""
    sizes = {**COMPANY, "num_scheduler_steps": 1}
    different = 0
    with (
        new_engine(dtype, ALONE, (1,), deterministic=deterministic) as single,
        new_engine(dtype, sizes, (40,), deterministic=deterministic) as many,
    ):
        for seed in range(6):
            needle = seed % len(NEEDLES)
            (output,) = single.generate(PROMPTS[needle], params_of(needle))
            different += returned(among_others(many, needle, seed)) != returned(output)
    return different


def test_in_bfloat16_with_plain_attention() -> None:
    assert num_different("bfloat16", deterministic=True) == 0


def test_without_it_the_bits_depend_on_the_batch() -> None:
    """Else the tests above would prove nothing. A product of one row adds up in another order than one of many."""
    assert num_different("float32", deterministic=False) > 0


@pytest.mark.parametrize(("attention", "error"), [("reference", NotImplementedError), ("xla", None)])
def test_a_named_attention_must_be_able_to(attention: str, error: type[Exception] | None) -> None:
    if error is None:
        Engine(tiny_decoder(), deterministic=True, attention=attention, **SIZES).close()
        return
    with pytest.raises(error, match="'reference' cannot be used with deterministic=True"):
        Engine(tiny_decoder(), deterministic=True, attention=attention, **SIZES)


def test_it_is_true_or_false() -> None:
    with pytest.raises(InvalidRequestError, match="deterministic"):
        Engine(tiny_decoder(), deterministic="yes", **SIZES)

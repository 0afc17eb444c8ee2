"""After the warm-up nothing compiles, whatever requests ask for."""

from collections.abc import Iterator

import jax
import pytest

from jaxpaged import Engine, SamplingParams
from tests.engine.tiny import GREEDY, drain, idle, new_engine, prompt_of

MIX: list[SamplingParams] = [
    GREEDY,
    GREEDY.clone(logprobs=0),
    GREEDY.clone(logprobs=20, prompt_logprobs=5, n=2),
    SamplingParams(temperature=0.7, max_tokens=20),
    SamplingParams(top_k=5, top_p=0.9, min_p=0.01, seed=1, n=3, logprobs=3),
    GREEDY.clone(repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1),
    GREEDY.clone(logit_bias={4: 2.0}, allowed_token_ids=range(3, 50)),
    GREEDY.clone(bad_words=["the cat", "x"], min_tokens=3, ignore_eos=False),
    GREEDY.clone(stop=["a"], stop_token_ids=[9], n=4),
    GREEDY.clone(max_tokens=40, prompt_logprobs=-1, logprobs=-1),
]


@pytest.fixture(scope="module")
def warm() -> Iterator[Engine]:
    with new_engine(warmup=True) as engine:
        yield engine


def test_the_listener_hears_compilations(compiled: list[str]) -> None:
    jax.jit(lambda x: x + 1)(3)
    assert compiled


def test_nothing_compiles_after_the_warm_up(warm: Engine, compiled: list[str]) -> None:
    before = warm.stats()
    # Buckets 1, 2, 4, 8 and 16; several decode steps in all but the last, for eight rows; three small programs.
    assert before.num_compiles == 5 + 4 + 3
    with idle(warm):
        for round_ in range(2):
            for i, params in enumerate(MIX):
                warm.add_request(f"{round_}.{i}", prompt_of(3 + 5 * i), params)
                if i % 3 == round_:
                    warm.step()
            warm.abort_request(f"{round_}.{9}")
            assert len(drain(warm)) == 10
        for params in MIX:
            warm.generate([prompt_of(30), prompt_of(1)], params)
            list(warm.stream(prompt_of(9), params))
    after = warm.stats()
    assert after.num_preemptions > before.num_preemptions
    assert after.blocks_copied > before.blocks_copied
    assert after.prefix_cache_hits > before.prefix_cache_hits
    assert after.num_compiles == before.num_compiles
    assert compiled == []


def test_an_engine_compiles_only_what_it_needs_otherwise() -> None:
    with new_engine() as engine:
        assert engine.stats().num_compiles == 0
        engine.generate(prompt_of(1), GREEDY.clone(max_tokens=3))
        assert engine.stats().num_compiles == 1
        assert engine.stats().compile_time > 0

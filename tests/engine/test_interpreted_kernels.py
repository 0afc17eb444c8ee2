"""A whole engine over the GPU kernels, in the interpreter: chunks, decoding, a shared prefix and a fork."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from jaxpaged import Engine, RequestOutput, SamplingParams, program
from jaxpaged.pallas_kernels.cache_scatter.mosaic_gpu import cache_scatter_mosaic_gpu
from jaxpaged.pallas_kernels.paged_attention import api, mosaic_gpu
from tests.engine.tiny import CONFIG, prompt_of, tiny_decoder
from tests.pallas_kernels.interpreter import interpreter
from tests.pallas_kernels.mosaic import SMALL_GPU

WIDE = replace(CONFIG, hidden_size=128, head_dim=64, sliding_windows=(None, 24))
SIZES: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 16,
    "num_blocks": 20,
    "max_model_len": 64,
    "num_scheduler_steps": 1,
    "dtype": "bfloat16",
}
PROMPTS = [prompt_of(35, 0), prompt_of(5, 1), [*prompt_of(35, 0)[:32], *prompt_of(2, 2)]]


def generate(attention: str) -> tuple[list[RequestOutput], int]:
    """The outputs, and how many blocks forks copied."""
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=0)
    with Engine(tiny_decoder(WIDE, "bfloat16"), attention=attention, **SIZES) as engine:
        outputs = engine.generate(PROMPTS, [params, params.clone(n=2), params])
        return outputs, engine.stats().blocks_copied


def chosen(output: RequestOutput) -> list[float]:
    """Log-probability of each token of each completion."""
    found = []
    for completion in output.outputs:
        assert completion.logprobs is not None
        found += [step[t].logprob for step, t in zip(completion.logprobs, completion.token_ids, strict=True)]
    return found


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Puts the GPU kernels into the engine's programs; the list tells which were traced."""
    traced: list[str] = []

    def count(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            traced.append(name)
            return function(*arguments)

        return call

    with interpreter() as interpret:
        attend = partial(mosaic_gpu.paged_attention_mosaic_gpu, interpret=interpret, target=SMALL_GPU)
        scatter = partial(cache_scatter_mosaic_gpu, interpret=interpret, target=SMALL_GPU)
        monkeypatch.setitem(api.IMPLEMENTATIONS, "mosaic_gpu", count("attention", attend))
        monkeypatch.setattr(program, "cache_scatter", count("scatter", scatter))
        monkeypatch.setattr("jaxpaged.pallas_kernels.mosaic_gpu.gpu_target", lambda: SMALL_GPU)
        yield traced


@pytest.mark.slow
def test_an_engine_over_the_gpu_kernels_says_the_same(kernels: list[str]) -> None:
    """As with plain JAX's attention, as far as bfloat16 allows; and without a race."""
    outputs, copied = generate("mosaic_gpu")
    assert {"attention", "scatter"} == set(kernels)
    plain, _ = generate("xla")
    assert copied > 0
    assert outputs[2].num_cached_tokens == 32
    for output, expected in zip(outputs, plain, strict=True):
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in expected.outputs]
        np.testing.assert_allclose(chosen(output), chosen(expected), atol=0.05, rtol=0)

"""A deterministic engine on a GPU: the bits of tokens and log-probabilities do not depend on the batch.

The model is wide enough for products to have several tiles, and steps are long enough for two tiles of rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from jaxpaged import Engine, RequestOutput, SamplingParams
from tests.engine.tiny import CONFIG, prompt_of, tiny_decoder

pytestmark = pytest.mark.gpu

WIDE = replace(CONFIG, hidden_size=1024, intermediate_size=2816, num_heads=16, num_kv_heads=4, head_dim=64)
SIZES: dict[str, Any] = {
    "max_num_batched_tokens": 512,
    "block_size": 16,
    "num_blocks": 40,  # 39 of 16 tokens: not all requests fit together
    "max_model_len": 128,
    "warmup": False,
}
LENGTHS = [(70, 40), (3, 50), (37, 45), (65, 30), (16, 60), (15, 40), (1, 40), (100, 20)]  # prompt, output
PROMPTS = [prompt_of(length, seed) for seed, (length, _) in enumerate(LENGTHS)]
PARAMS = [
    SamplingParams(temperature=i % 3 / 2, seed=i, max_tokens=count, ignore_eos=True, logprobs=2)
    for i, (_, count) in enumerate(LENGTHS)
]


def returned(outputs: Sequence[RequestOutput]) -> list[Any]:
    return [output.outputs for output in outputs]


@pytest.mark.parametrize("attention", [None, "xla"])
def test_alone_in_company_preempted_and_cached(attention: str | None) -> None:
    options = SIZES | {"attention": attention, "deterministic": True}
    model = tiny_decoder(WIDE, "bfloat16")
    with Engine(model, max_num_seqs=1, num_scheduler_steps=1, **options) as engine:
        alone = [returned(engine.generate(p, s))[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
    with Engine(model, max_num_seqs=16, num_scheduler_steps=4, **options) as engine:
        for _ in range(3):
            assert returned(engine.generate(PROMPTS, PARAMS)) == alone
        assert returned(engine.generate(PROMPTS[::-1], PARAMS[::-1])) == alone[::-1]
        assert engine.stats().num_preemptions > 0
        assert engine.stats().prefix_cache_hits > 0
        plain = [params.clone(logprobs=None) for params in PARAMS]
        tokens = [output.outputs[0].token_ids for output in engine.generate(PROMPTS, plain)]
        assert tokens == [completions[0].token_ids for completions in alone]

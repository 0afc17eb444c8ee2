"""Every family, attention implementation and variant serves what the dense forward pass computes."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from jaxpaged import AttentionVariant, Engine
from jaxpaged.config import EngineConfig
from jaxpaged.models import RopeScaling
from tests.engine.tiny import CONFIG, GREEDY, dense_logprobs, idle, is_dense_greedy, prompt_of, tiny_decoder

FAMILIES = {
    "llama": CONFIG,
    "llama 3": replace(
        CONFIG, rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 32), tie_word_embeddings=True
    ),
    "mistral": replace(CONFIG, architecture="MistralForCausalLM", sliding_windows=(5, 11)),
    "qwen 2": replace(
        CONFIG, architecture="Qwen2ForCausalLM", attention_bias=True, sliding_windows=(None, 7)
    ),
    "qwen 3": replace(CONFIG, architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=32),
}

SLOPES = jnp.array([0.5, 0.25, 0.1, 0.02])
VARIANTS = {
    "none": None,
    "alibi": AttentionVariant(
        score_mod=lambda score, row, head, q_pos, kv_pos: score - SLOPES[head] * (q_pos - kv_pos)
    ),
    "every other": AttentionVariant(
        logit_soft_cap=2.0,
        sinks=jnp.array([0.3, -1.0, 2.0, 0.0]),
        mask_mod=lambda row, head, q_pos, kv_pos: ((q_pos - kv_pos) % 2 == 0) | (kv_pos < 3),
    ),
}

# Programs are dear: two rows in steps of two tokens.
SIZES: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 2,
    "block_size": 4,
    "num_blocks": 14,  # 52 tokens: two requests of 30 do not fit together
    "max_model_len": 64,
    "num_scheduler_steps": 1,
}


@pytest.fixture(autouse=True)
def _one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program an engine: the largest bucket."""
    monkeypatch.setattr(EngineConfig, "buckets", property(lambda self: (self.max_num_batched_tokens,)))


@pytest.mark.parametrize(
    ("family", "attention", "variant"),
    [
        *(("mistral", attention, "none") for attention in ("reference", "xla", "numba")),
        *((family, None, "none") for family in ("llama 3", "qwen 2", "qwen 3")),
        ("mistral", None, "alibi"),
        ("llama", "reference", "every other"),
    ],
)
def test_paged_equals_dense(family: str, attention: str | None, variant: str) -> None:
    model, chosen = tiny_decoder(FAMILIES[family]), VARIANTS[variant]
    prompts = [prompt_of(13), prompt_of(9)]
    params = GREEDY.clone(max_tokens=20)
    with Engine(model, variant=chosen, attention=attention, **SIZES) as engine, idle(engine):
        for _ in range(2):  # the second time from the prefix cache
            for output in engine.generate([*prompts, prompts[0]], params):
                assert is_dense_greedy(output.prompt_token_ids, output.outputs[0].token_ids, model, chosen)
        stats = engine.stats()
        if FAMILIES[family].sliding_windows[0] is None:
            assert stats.num_preemptions > 0
            assert stats.prefix_cache_hits > 0
        else:
            # The blocks behind the window are given back: memory never runs short, and they are used again long before
            # the prompt comes back (test_hybrid finds such prefixes in a larger pool).
            assert stats.num_preemptions == 0
            assert stats.blocks_trimmed > 0


@pytest.mark.parametrize("variant", ["alibi", "every other"])
def test_a_variant_changes_what_is_said(variant: str) -> None:
    """Else the comparison above would prove nothing of it."""
    tokens = prompt_of(13)
    model = tiny_decoder(FAMILIES["llama"])
    assert abs(dense_logprobs(tokens, model) - dense_logprobs(tokens, model, VARIANTS[variant])).max() > 0.1


def test_new_values_in_a_variant_change_the_outcome_and_nothing_else() -> None:
    model = tiny_decoder()
    for slope in (0.0, 1.0):
        slopes = jnp.full(4, slope)
        variant = AttentionVariant(score_mod=lambda s, row, head, q, kv, a=slopes: s - a[head] * (q - kv))
        with Engine(model, variant=variant, **SIZES) as engine:
            (output,) = engine.generate(prompt_of(13), GREEDY.clone(max_tokens=10))
        assert is_dense_greedy(prompt_of(13), output.outputs[0].token_ids, model, variant)
        assert is_dense_greedy(prompt_of(13), output.outputs[0].token_ids, model) is (slope == 0.0)


@pytest.mark.parametrize(
    ("attention", "variant", "words"),
    [
        ("numba", VARIANTS["alibi"], "'numba' cannot be used here: score_mod and mask_mod are JAX functions"),
        ("mosaic_gpu", None, "'mosaic_gpu' cannot be used here: it needs an NVIDIA GPU"),
    ],
)
def test_a_named_implementation_never_falls_back(
    attention: str, variant: AttentionVariant | None, words: str
) -> None:
    """Nor does it wait for the first request to say so."""
    with pytest.raises(NotImplementedError, match=words):
        Engine(tiny_decoder(), variant=variant, attention=attention, **SIZES)


def test_low_precision_runs_and_stays_close() -> None:
    """bfloat16 weights and pool: the log-probability of what is said is near that of the float32 forward."""
    with Engine(tiny_decoder(CONFIG, "bfloat16"), **SIZES) as engine:
        assert engine.config.dtype == "bfloat16"
        (output,) = engine.generate(prompt_of(13), GREEDY.clone(max_tokens=10, logprobs=0))
    tokens = output.outputs[0].token_ids
    reference = dense_logprobs([*prompt_of(13), *tokens])[12:-1]
    found = output.outputs[0].logprobs
    assert found is not None
    for row, token, each in zip(reference, tokens, found, strict=True):
        assert each[token].logprob == pytest.approx(row[token], abs=0.3)

"""The decoder computes what Hugging Face transformers does, for every family."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxpaged.models import Decoder, load_config, load_model, save_model
from jaxpaged.models.decoder import attend_causally
from jaxpaged.pallas_kernels import AttentionVariant
from tests.models.golden import NAMES, NEW_TOKENS, golden


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name: str) -> None:
    expected = golden(name)
    model = load_model(expected.folder, dtype=jnp.float32)
    logits = model(jnp.asarray(expected.tokens)[None])[0]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_those_of_transformers(name: str) -> None:
    expected = golden(name).tokens
    model = load_model(golden(name).folder, dtype=jnp.float32)
    logits = jax.jit(lambda tokens: model(tokens))
    tokens = np.zeros_like(expected)
    prompt_length = len(expected) - NEW_TOKENS
    tokens[:prompt_length] = expected[:prompt_length]
    for position in range(prompt_length, len(expected)):
        tokens[position] = logits(jnp.asarray(tokens))[position - 1].argmax()
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_checkpoint_computes_the_same(name: str, tmp_path: Path) -> None:
    model = load_model(golden(name).folder, dtype=jnp.float32)
    save_model(model, tmp_path, dtype=jnp.float32)
    tokens = jnp.asarray(golden(name).tokens)
    np.testing.assert_array_equal(load_model(tmp_path)(tokens), model(tokens))
    assert load_config(tmp_path) == model.config


def test_the_sliding_window_matters_at_the_lengths_tested() -> None:
    """Guards the goldens: without its window Mistral must not agree."""
    expected = golden("mistral")
    model = load_model(expected.folder, dtype=jnp.float32)

    def attend_everywhere(
        q: jax.Array, k: jax.Array, v: jax.Array, kv: Any, layer: int, variant: AttentionVariant
    ) -> tuple[jax.Array, Any]:
        assert variant.sliding_window == 8
        return attend_causally(q, k, v, kv, layer, AttentionVariant())

    logits = model(jnp.asarray(expected.tokens), attend=attend_everywhere)
    assert np.abs(logits - expected.logits).max() > 0.1


@pytest.mark.parametrize("name", ["llama2", "qwen2"])
def test_bfloat16_stays_near_float32(name: str) -> None:
    expected = golden(name)
    logits = load_model(expected.folder, dtype=jnp.bfloat16)(jnp.asarray(expected.tokens))
    assert logits.dtype == jnp.float32
    assert np.abs(logits - expected.logits).mean() < 0.02 * np.abs(expected.logits).mean()


def test_layers_see_their_index_and_thread_the_cache() -> None:
    """An ``attend`` with a cache gets (kv, layer) in order and its last kv comes back, on flat tokens too."""
    model = load_model(golden("qwen2").folder, dtype=jnp.float32)
    tokens = jnp.asarray(golden("qwen2").tokens)
    seen = []

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, kv: Any, layer: int, variant: AttentionVariant
    ) -> tuple[jax.Array, Any]:
        seen.append((kv, layer, variant.sliding_window, q.shape, k.shape, v.shape))
        return attend_causally(q, k, v, kv, layer, variant)[0], kv + 1

    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    hidden, kv = model.hidden(tokens, positions, attend, 10)
    shapes = (len(tokens), 4, 16), (len(tokens), 2, 16), (len(tokens), 2, 16)
    assert seen == [(10, 0, None, *shapes), (11, 1, 8, *shapes)]
    assert kv == 12
    np.testing.assert_array_equal(model.logits(hidden), model(tokens))


def test_an_untrained_decoder_predicts_nearly_uniformly() -> None:
    model = Decoder(load_config(golden("llama3").folder), rngs=nnx.Rngs(0))
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    log_probs = jax.nn.log_softmax(model(tokens))
    np.testing.assert_allclose(log_probs, -np.log(128), atol=1.0)


def test_positions_beyond_the_prompt_are_relative() -> None:
    """Rotary embeddings: shifting all positions alike leaves the logits."""
    model = load_model(golden("llama2").folder, dtype=jnp.float32)
    tokens = jnp.asarray(golden("llama2").tokens)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    np.testing.assert_allclose(model(tokens, positions + 17), model(tokens, positions), atol=1e-4)

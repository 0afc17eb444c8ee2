"""The decoder trained on the end of a sequence whose beginning is in the cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.models import Parameters, split_parameters
from jaxpaged.pallas_kernels import (
    AttentionBatch,
    AttentionVariant,
    KVPool,
    causal_attention,
    paged_attention_step,
)
from tests.engine.tiny import CONFIG, prompt_of, tiny_decoder

BLOCK_SIZE, PREFIX, SUFFIX = 4, 21, 9
TOKENS = jnp.asarray(prompt_of(PREFIX + SUFFIX + 1), jnp.int32)
POSITIONS = jnp.arange(PREFIX + SUFFIX, dtype=jnp.int32)
Loss = Callable[[Parameters], jax.Array]


def batch_of(begin: int, end: int) -> AttentionBatch:
    """One row, these of its tokens; its blocks are 1, 2, ... in order."""
    table = jnp.arange(1, 1 - (-len(POSITIONS) // BLOCK_SIZE), dtype=jnp.int32)
    at = POSITIONS[begin:end]
    slots = table[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
    return AttentionBatch(
        table[None],
        jnp.array([end], jnp.int32),
        jnp.array([0, end - begin], jnp.int32),
        jnp.zeros(end - begin, jnp.int32),
        at,
        slots,
    )


def loss_of(model: Any, hidden: jax.Array) -> jax.Array:
    """Mean cross entropy of the tokens that follow the suffix's."""
    logprobs = jax.nn.log_softmax(model.logits(hidden), axis=-1)
    return -jnp.take_along_axis(logprobs, TOKENS[PREFIX + 1 :, None], axis=1).mean()


def paged(merge: Any, parameters: Parameters) -> Loss:
    """Over a cache that ``parameters`` filled."""

    def hidden(parameters: Parameters, pool: KVPool, begin: int, end: int) -> tuple[jax.Array, KVPool]:
        batch = batch_of(begin, end)

        def attend(
            q: jax.Array, k: jax.Array, v: jax.Array, kv: KVPool, layer: int, variant: AttentionVariant
        ) -> tuple[jax.Array, KVPool]:
            return paged_attention_step(q, k, v, kv, layer, batch, variant=variant)

        return merge(parameters).hidden(TOKENS[begin:end], batch.positions, attend, pool)

    sizes = {"num_kv_heads": CONFIG.num_kv_heads, "head_dim": CONFIG.head_dim, "block_size": BLOCK_SIZE}
    pool = KVPool.zeros(num_layers=CONFIG.num_layers, num_blocks=12, dtype=jnp.float32, **sizes)
    _, cached = jax.jit(hidden, static_argnums=(2, 3))(parameters, pool, 0, PREFIX)
    return lambda parameters: loss_of(
        merge(parameters), hidden(parameters, cached, PREFIX, PREFIX + SUFFIX)[0]
    )


def dense(merge: Any, parameters: Parameters) -> Loss:
    """Whole sequences without a cache; keys and values of the prefix are those that ``parameters`` gave."""
    constants: list[tuple[jax.Array, jax.Array]] = []

    def record(q: Any, k: Any, v: Any, kv: Any, layer: int, variant: AttentionVariant) -> tuple[Any, Any]:
        constants.append((k, v))
        return causal_attention(q, k, v, variant=variant), kv

    merge(parameters).hidden(TOKENS[:PREFIX], POSITIONS[:PREFIX], record)

    def attend(q: Any, k: Any, v: Any, kv: Any, layer: int, variant: AttentionVariant) -> tuple[Any, Any]:
        k, v = (jnp.concatenate([old, new]) for old, new in zip(constants[layer], (k, v), strict=True))
        # Queries of the prefix are of no use to anybody.
        q = jnp.pad(q, ((PREFIX, 0), (0, 0), (0, 0)))
        return causal_attention(q, k, v, variant=variant)[PREFIX:], kv

    def loss(parameters: Parameters) -> jax.Array:
        model = merge(parameters)
        return loss_of(model, model.hidden(TOKENS[PREFIX:-1], POSITIONS[PREFIX:], attend)[0])

    return loss


def test_a_step_of_training_over_a_cached_prefix() -> None:
    """Loss and gradients of all parameters are those with the prefix's keys held constant, and the step helps."""
    parameters, merge = split_parameters(tiny_decoder())
    losses = paged(merge, parameters), dense(merge, parameters)
    (found, gradient), (expected, theirs) = (jax.jit(jax.value_and_grad(loss))(parameters) for loss in losses)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for name, mine in gradient.items():
        assert np.abs(theirs[name]).max() > 1e-4, name
        np.testing.assert_allclose(
            mine, theirs[name], atol=1e-4 * np.abs(theirs[name]).max(), rtol=0, err_msg=name
        )
    norm = sum(float((g**2).sum()) for g in gradient.values()) ** 0.5
    trained = {name: array - 0.1 / norm * gradient[name] for name, array in parameters.items()}
    np.testing.assert_allclose(found - jax.jit(losses[0])(trained), 0.1 * norm, rtol=0.3)

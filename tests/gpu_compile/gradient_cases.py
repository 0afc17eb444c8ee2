"""Cases of the gradient of paged attention: a chain of layers over a donated pool."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels import AttentionBatch, KVPool, paged_attention_step
from tests.gpu_compile.attention_cases import attention_batch
from tests.gpu_compile.case import CompileCase, Expects, Program
from tests.gpu_compile.pool_cases import NUM_LAYERS, pool_shape

NUM_TOKENS, NUM_ROWS, NUM_HEADS = 512, 2, 32


def chain_program(implementation: str) -> Program:
    """The gradient through all layers of the pool, each with queries, keys and values from the one before."""
    pool = pool_shape()
    num_kv_heads, block_size, head_dim = pool.k.shape[1:]

    def loss(scale: jax.Array, x: jax.Array, pool: Any, batch: AttentionBatch) -> tuple[jax.Array, KVPool]:
        for layer in range(NUM_LAYERS):
            q = x * scale[layer]
            k, v = q[:, :num_kv_heads], q[:, num_kv_heads : 2 * num_kv_heads]
            x, pool = paged_attention_step(q, k, v, pool, layer, batch, implementation=implementation)
        return x.astype(jnp.float32).sum(), pool

    def program(pool: Any, scale: jax.Array, x: jax.Array, batch: AttentionBatch) -> tuple[jax.Array, KVPool]:
        return jax.grad(loss, has_aux=True)(scale, x, pool, batch)

    x = jax.ShapeDtypeStruct((NUM_TOKENS, NUM_HEADS, head_dim), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((NUM_LAYERS,), jnp.bfloat16)
    return Program(program, (pool, scale, x, attention_batch(NUM_TOKENS, NUM_ROWS, block_size)), (0,))


# Kept for the backward pass: the rows' blocks.
XLA = Expects(updates_in_place=True, max_temp_share=1 / 4)
MOSAIC = Expects(updates_in_place=True, max_temp_share=1 / 4, min_kernels=2)

CASES = (
    CompileCase("gradient-xla-chain", partial(chain_program, "xla"), ("h200",), XLA),
    CompileCase("gradient-mosaic-chain", partial(chain_program, "mosaic_gpu"), ("h200", "a100"), MOSAIC),
)

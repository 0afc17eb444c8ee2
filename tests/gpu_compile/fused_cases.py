"""Cases of kernels that take the place of several of XLA's: rotation and scatter, the search for a row's cutoff."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels import KVPool
from jaxpaged.pallas_kernels.kept_cutoff.mosaic_gpu import kept_cutoff_mosaic_gpu
from jaxpaged.pallas_kernels.rope_scatter import rope_scatter
from tests.gpu_compile.case import CompileCase, Expects, Program
from tests.gpu_compile.pool_cases import MOSAIC, int32, pool_shape

GROUP = 4  # query heads of a key/value head


def rope_scatter_program(num_tokens: int, **pool: Any) -> Program:
    """Queries, keys and values of ``num_tokens`` tokens into layer 1 of a donated pool."""
    kv_pool = pool_shape(**pool)
    _, num_kv_heads, _, head_dim = kv_pool.k.shape
    qkv = jax.ShapeDtypeStruct((num_tokens, num_kv_heads, GROUP + 2, head_dim), kv_pool.k.dtype)
    table = jax.ShapeDtypeStruct((num_tokens, head_dim // 2), jnp.float32)

    def program(
        kv_pool: KVPool, qkv: jax.Array, cos: jax.Array, sin: jax.Array, slots: jax.Array
    ) -> tuple[jax.Array, KVPool]:
        return rope_scatter(qkv, cos, sin, kv_pool, 1, slots, implementation="mosaic_gpu")

    return Program(program, (kv_pool, qkv, table, table, int32(num_tokens)), (0,))


def cutoff_program(num_rows: int, vocab_size: int) -> Program:
    """Cutoffs of rows of logits."""
    of_row = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    logits: Any = jax.ShapeDtypeStruct((num_rows, vocab_size), jnp.float32)
    return Program(kept_cutoff_mosaic_gpu, (logits, of_row, of_row, int32(num_rows), of_row, of_row))


CASES = (
    CompileCase("rope-scatter-decode", partial(rope_scatter_program, 64), ("h200", "a100", "b200"), MOSAIC),
    CompileCase("rope-scatter-prefill", partial(rope_scatter_program, 2048), ("h200",), MOSAIC),
    CompileCase(
        "rope-scatter-d64",
        partial(rope_scatter_program, 64, head_dim=64, dtype="float16"),
        ("h200", "a100"),
        MOSAIC,
    ),
    CompileCase(
        "kept-cutoff-128256",
        partial(cutoff_program, 64, 128256),
        ("h200", "a100", "l40"),
        Expects(min_kernels=1),
    ),
    CompileCase("kept-cutoff-32000", partial(cutoff_program, 256, 32000), ("h200",), Expects(min_kernels=1)),
)

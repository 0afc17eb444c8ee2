"""Paged attention on the CPU, compiled by numba and called from inside the XLA program.

XLA:CPU cannot fuse a gather into a matrix product: it copies every block of every row before it multiplies,
and the copy costs more than the attention. This kernel reads the pool where it lies.

Loop nest: rows, tiles of up to ``TILE_Q`` query tokens, chunks of ``CHUNK`` keys, blocks, kv heads. Scores of
a chunk are stored, then one online-softmax step is taken over them (arXiv:1805.02867), then values are
accumulated; the next block is prefetched while one is in use, because blocks are scattered over memory and
the hardware's prefetcher does not follow. Work is that of the real tokens: a decode row is a tile of one.
Blocks outside of a sliding window are not touched, nor are slots past a query's own position.

Numerics: float32 throughout; ``exp2`` is a degree-6 polynomial with a relative error below 2e-7.
The order of additions for one query depends on nothing but its position and the block size.
"""

import os
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.pallas_kernels.batch import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.variant import AttentionVariant


def unsupported_reason(q_dtype: jnp.dtype, pool_dtype: jnp.dtype, variant: AttentionVariant) -> str | None:
    """Why this implementation cannot take a call, or None."""
    if jnp.dtype(q_dtype) != jnp.float32 or jnp.dtype(pool_dtype) != jnp.float32:
        return (
            f"it computes in float32 only, got queries {jnp.dtype(q_dtype)} and pool {jnp.dtype(pool_dtype)}"
        )
    if variant.has_mods:
        return "score_mod and mask_mod are JAX functions, which compiled CPU code cannot trace"
    return None


@cache
def _register() -> str:
    """Compiles the kernel and makes it an FFI target; numba is imported on first use (0.5 s)."""
    from jaxpaged.pallas_kernels.numba_ffi import register
    from jaxpaged.pallas_kernels.paged_attention.numba_kernel import paged_attention_frame

    name = "jaxpaged_paged_attention"
    register(name, paged_attention_frame)
    return name


def num_parts(num_kv_heads: int) -> int:
    """In how many calls over disjoint kv heads a layer is split; XLA runs independent calls in parallel."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(p for p in range(1, min(cores, num_kv_heads) + 1) if num_kv_heads % p == 0)


def paged_attention_numba(
    q: jax.Array, kv_pool: KVPool, layer: int, batch: AttentionBatch, variant: AttentionVariant
) -> jax.Array:
    """Attention over the pool in place; arguments as in ``paged_attention``.

    Raises:
      NotImplementedError: another dtype than float32, or a variant with functions.
    """
    reason = unsupported_reason(q.dtype, kv_pool.k.dtype, variant)
    if reason is not None:
        raise NotImplementedError(f"paged_attention implementation 'numba': {reason}")
    target = _register()
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = kv_pool.k.shape[1]
    parts = num_parts(num_kv_heads)
    cap = variant.logit_soft_cap or 0.0
    floats = jnp.asarray(np.array([variant.scale_for(head_dim), cap], np.float32))
    sinks = jnp.zeros(0, jnp.float32) if variant.sinks is None else variant.sinks.astype(jnp.float32)
    outs = []
    for part in range(parts):
        heads = num_heads // parts
        kv_heads = num_kv_heads // parts
        layer_base = layer * kv_pool.num_blocks
        ints = np.array([layer_base, variant.sliding_window or 0, part * kv_heads, kv_heads], np.int32)
        call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((num_tokens, heads, head_dim), jnp.float32))
        outs.append(
            call(
                q,
                kv_pool.k,
                kv_pool.v,
                batch.block_tables,
                batch.query_start_loc,
                batch.positions,
                jnp.asarray(ints),
                floats,
                sinks,
            )
        )
    return outs[0] if parts == 1 else jnp.concatenate(outs, axis=1)

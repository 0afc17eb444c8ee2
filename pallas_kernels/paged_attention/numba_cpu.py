"""Paged attention on the CPU, compiled by numba and called from inside the XLA program.

XLA:CPU cannot fuse a gather into a matrix product: it copies every block of every row before it multiplies,
and the copy costs more than the attention. This kernel reads the pool where it lies.

Loop nest: rows, tiles of up to ``TILE_Q`` query tokens, chunks of ``CHUNK`` keys, blocks, kv heads. Scores of
a chunk are stored, then one online-softmax step is taken over them (arXiv:1805.02867), then values are
accumulated; the next block is prefetched while one is in use, because blocks are scattered over memory and
the hardware's prefetcher does not follow. Work is that of the real tokens: a decode row is a tile of one.
Blocks outside of a sliding window are not touched, nor are slots past a query's own position.

Of a quantised pool, a block's codes become float32 in scratch memory once for a tile of queries, and the same loops run
over that. Scales multiply scores and weights.

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

KINDS = {"fp8_e4m3": 0, "int8": 1, "int4": 2}  # the kernel's numbers of the formats of ``quantisation``


def unsupported_reason(q: jax.Array, kv_pool: KVPool, variant: AttentionVariant) -> str | None:
    """Why this implementation cannot take a call, or None."""
    if q.dtype != jnp.float32 or (kv_pool.format is None and kv_pool.k.dtype != jnp.float32):
        return f"it computes in float32 only, got queries {q.dtype} and pool {kv_pool.k.dtype}"
    if variant.has_mods:
        return "score_mod and mask_mod are JAX functions, which compiled CPU code cannot trace"
    return None


@cache
def _register(quantised: bool) -> str:
    """Compiles one of the two kernels and makes it an FFI target; numba is imported on first use (0.5 s)."""
    from jaxpaged.pallas_kernels.numba_ffi import register
    from jaxpaged.pallas_kernels.paged_attention import numba_kernel

    name = "jaxpaged_quantised_attention" if quantised else "jaxpaged_paged_attention"
    register(
        name, numba_kernel.quantised_attention_frame if quantised else numba_kernel.paged_attention_frame
    )
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
      NotImplementedError: queries or a pool of another dtype, or a variant with functions.
    """
    reason = unsupported_reason(q, kv_pool, variant)
    if reason is not None:
        raise NotImplementedError(f"paged_attention implementation 'numba': {reason}")
    kind = kv_pool.format
    target = _register(kind is not None)
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
        window = variant.sliding_window or 0
        code = 0 if kind is None else KINDS[kind.name]
        ints = np.array([layer_base, window, part * kv_heads, kv_heads, code], np.int32)
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
                *kv_pool.arrays[2:],
            )
        )
    return outs[0] if parts == 1 else jnp.concatenate(outs, axis=1)

"""What paged attention means, in as few lines as possible: the oracle of every other implementation."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.paged_attention.blocks import read_blocks
from jaxpaged.pallas_kernels.variant import MASKED, AttentionVariant, modify_scores


def paged_attention_reference(
    q: jax.Array, kv_pool: KVPool, layer: int, batch: AttentionBatch, variant: AttentionVariant
) -> jax.Array:
    """Gathers every row's whole table and attends densely; arguments as in ``paged_attention``."""
    num_tokens, num_heads, head_dim = q.shape
    tables = batch.block_tables + layer * kv_pool.num_blocks
    # [B, M, Hkv, S, D] -> [B, M*S, Hkv, D], then one copy per token, each kv head repeated for its group.
    k, v = (
        x.swapaxes(2, 3).reshape(tables.shape[0], -1, kv_pool.num_kv_heads, head_dim)
        for x in read_blocks(kv_pool, tables)
    )
    group = num_heads // k.shape[2]
    k, v = (jnp.repeat(x[batch.rows], group, axis=2).astype(jnp.float32) for x in (k, v))
    kv_pos = jnp.arange(k.shape[1])[None, None, :]
    q_pos, row = batch.positions[:, None, None], batch.rows[:, None, None]
    head = jnp.arange(num_heads)[None, :, None]
    scores = jnp.einsum("thd,tkhd->thk", q.astype(jnp.float32), k) * variant.scale_for(head_dim)
    scores, visible = modify_scores(variant, scores, row, head, q_pos, kv_pos)
    real = (jnp.arange(num_tokens) < batch.query_start_loc[-1])[:, None, None]
    visible = jnp.broadcast_to(visible & (kv_pos < batch.seq_lens[row]) & real, scores.shape)
    scores = jnp.where(visible, scores, MASKED)
    sinks = jnp.full(num_heads, MASKED) if variant.sinks is None else variant.sinks.astype(jnp.float32)
    top = jnp.maximum(scores.max(-1), sinks[None, :])
    weights = jnp.where(visible, jnp.exp(scores - top[..., None]), 0.0)
    total = weights.sum(-1) + jnp.exp(sinks[None, :] - top)
    # Slots that no token has written may hold anything, NaN included.
    seen = visible.any(1)[:, :, None, None]
    out = jnp.einsum("thk,tkhd->thd", weights, jnp.where(seen, v, 0.0)) / jnp.maximum(total, 1e-30)[..., None]
    return out.astype(q.dtype)

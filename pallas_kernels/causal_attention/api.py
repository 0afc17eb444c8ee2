"""Dense causal attention over contiguous sequences, with the same variants as the paged one."""

import math

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.variant import MASKED, AttentionVariant, modify_scores


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, variant: AttentionVariant | None = None
) -> jax.Array:
    """Causal attention of whole sequences, differentiable; scores and softmax in float32.

    Args:
      q: ``[..., T, Hq, D]``, positions 0 to T-1.
      k, v: ``[..., T, Hkv, D]``; ``Hkv`` divides ``Hq``.
      variant: see ``AttentionVariant``; its ``row`` counts the leading axes, flattened.

    Returns:
      ``[..., T, Hq, D]`` in the dtype of ``q``.

    Raises:
      ValueError: shapes that do not fit each other.
    """
    *lead, num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[-2]
    if k.shape != v.shape or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != head_dim:
        raise ValueError(
            f"causal_attention: q.shape={q.shape}, k.shape={k.shape}, v.shape={v.shape} do not fit"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"causal_attention: {num_heads} query heads are no multiple of {num_kv_heads} kv heads"
        )
    variant = variant or AttentionVariant()
    group, rows = num_heads // num_kv_heads, math.prod(lead)

    grouped = q.reshape(rows, num_tokens, num_kv_heads, group, head_dim)
    k, v = (x.reshape(rows, num_tokens, num_kv_heads, head_dim) for x in (k, v))
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k, preferred_element_type=jnp.float32)
    index = jax.lax.broadcasted_iota
    kv_head, member = (
        index(jnp.int32, (1, num_kv_heads, 1, 1, 1), 1),
        index(jnp.int32, (1, 1, group, 1, 1), 2),
    )
    head = kv_head * group + member
    scores, visible = modify_scores(
        variant,
        scores * variant.scale_for(head_dim),
        index(jnp.int32, (rows, 1, 1, 1, 1), 0),
        head,
        index(jnp.int32, (1, 1, 1, num_tokens, 1), 3),
        index(jnp.int32, (1, 1, 1, 1, num_tokens), 4),
    )
    scores = jnp.where(visible, scores, MASKED)
    if variant.sinks is not None:
        sinks = variant.sinks.astype(jnp.float32).reshape(1, num_kv_heads, group, 1, 1)
        sinks = jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]
    else:
        weights = jax.nn.softmax(scores, axis=-1)
    # A key that no query may see keeps weight zero even where a whole row is masked.
    weights = jnp.where(visible, weights, 0.0)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(*lead, num_tokens, num_heads, head_dim)

"""Rotation in plain JAX, then the cache scatter of the device: what the fused kernel is compared with."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.cache_scatter import cache_scatter


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the halves of x ``[T, H, D]`` by float32 tables ``[T, D/2]``, in float32; x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def rope_scatter_xla(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv_pool: KVPool,
    layer: int,
    slots: jax.Array,
    *,
    scatter: str | None = None,
) -> tuple[jax.Array, KVPool]:
    """Arguments as in ``rope_scatter``; ``scatter`` is the implementation of the cache scatter."""
    num_tokens, _, _, head_dim = qkv.shape
    q = rotate(qkv[:, :, :-2].reshape(num_tokens, -1, head_dim), cos, sin)
    k = rotate(qkv[:, :, -2], cos, sin)
    return q, cache_scatter(kv_pool, k, qkv[:, :, -1], layer, slots, implementation=scatter)

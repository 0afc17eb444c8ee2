"""Cache scatter: the keys and values of a step go to their slots of the pool, in place."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool


def cache_scatter(kv_pool: KVPool, k: jax.Array, v: jax.Array, layer: int, slots: jax.Array) -> KVPool:
    """Writes one key and value per token into the pool.

    In place when the pool's buffers are donated to the surrounding program (XLA scatter, no copy; a test reads
    the compiled memory analysis). Padding tokens carry slot 0 and land in the dummy block.

    Args:
      kv_pool: see ``KVPool``.
      k, v: ``[T, Hkv, D]``, cast to the pool's dtype.
      layer: which layer of the pool.
      slots: int32 ``[T]``, ``block_id * S + offset``; the host checks their range.

    Returns:
      The pool after the writes.

    Raises:
      ValueError: shapes that do not fit.
    """
    _, num_kv_heads, block_size, head_dim = kv_pool.k.shape
    if k.shape != v.shape or k.shape[1:] != (num_kv_heads, head_dim) or slots.shape != k.shape[:1]:
        raise ValueError(
            f"cache_scatter: k.shape={k.shape}, v.shape={v.shape}, slots.shape={slots.shape} do not fit "
            f"kv_pool.k.shape={kv_pool.k.shape}"
        )
    if not 0 <= layer < kv_pool.num_layers:
        raise ValueError(f"cache_scatter: layer={layer} is not in [0, {kv_pool.num_layers})")
    blocks = (layer * kv_pool.num_blocks + slots // block_size)[:, None]
    heads, offsets = jnp.arange(num_kv_heads)[None, :], (slots % block_size)[:, None]

    def write(pool: jax.Array, new: jax.Array) -> jax.Array:
        return pool.at[blocks, heads, offsets].set(new.astype(pool.dtype), mode="promise_in_bounds")

    return KVPool(write(kv_pool.k, k), write(kv_pool.v, v), kv_pool.num_layers)


def cache_scatter_reference(
    kv_pool: KVPool, k: jax.Array, v: jax.Array, layer: int, slots: jax.Array
) -> KVPool:
    """The same, token by token: the oracle."""
    pool_k, pool_v = kv_pool.k, kv_pool.v
    for token, slot in enumerate(slots.tolist()):
        block, offset = layer * kv_pool.num_blocks + slot // kv_pool.block_size, slot % kv_pool.block_size
        pool_k = pool_k.at[block, :, offset].set(k[token].astype(pool_k.dtype))
        pool_v = pool_v.at[block, :, offset].set(v[token].astype(pool_v.dtype))
    return KVPool(pool_k, pool_v, kv_pool.num_layers)

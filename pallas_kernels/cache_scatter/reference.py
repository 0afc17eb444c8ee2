"""What cache scatter means: the oracle of every other implementation."""

import jax

from jaxpaged.pallas_kernels.batch import KVPool


def cache_scatter_reference(
    kv_pool: KVPool, k: jax.Array, v: jax.Array, layer: int, slots: jax.Array
) -> KVPool:
    """Token by token; arguments as in ``cache_scatter``, ``slots`` with known values."""
    pool_k, pool_v = kv_pool.k, kv_pool.v
    for token, slot in enumerate(slots.tolist()):
        block, offset = layer * kv_pool.num_blocks + slot // kv_pool.block_size, slot % kv_pool.block_size
        pool_k = pool_k.at[block, :, offset].set(k[token].astype(pool_k.dtype))
        pool_v = pool_v.at[block, :, offset].set(v[token].astype(pool_v.dtype))
    return KVPool(pool_k, pool_v, kv_pool.num_layers)

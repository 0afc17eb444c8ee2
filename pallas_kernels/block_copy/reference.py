"""What the block moves mean: the oracles of every other implementation. Block ids must have known values."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool


def copy_blocks_reference(kv_pool: KVPool, sources: jax.Array, targets: jax.Array) -> KVPool:
    """Out of the pool, then into it; arguments as in ``copy_blocks``."""
    return scatter_blocks_reference(kv_pool, targets, *gather_blocks_reference(kv_pool, sources))


def gather_blocks_reference(kv_pool: KVPool, block_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Block by block; arguments as in ``gather_blocks``."""
    places = [
        [layer * kv_pool.num_blocks + i for i in block_ids.tolist()] for layer in range(kv_pool.num_layers)
    ]
    k, v = (
        jnp.stack([jnp.stack([pool[i] for i in row]) for row in places]) for pool in (kv_pool.k, kv_pool.v)
    )
    return k, v


def scatter_blocks_reference(kv_pool: KVPool, block_ids: jax.Array, k: jax.Array, v: jax.Array) -> KVPool:
    """Block by block; arguments as in ``scatter_blocks``."""
    pool_k, pool_v = kv_pool.k, kv_pool.v
    for layer in range(kv_pool.num_layers):
        for i, block_id in enumerate(block_ids.tolist()):
            block = layer * kv_pool.num_blocks + block_id
            pool_k = pool_k.at[block].set(k[layer, i].astype(pool_k.dtype))
            pool_v = pool_v.at[block].set(v[layer, i].astype(pool_v.dtype))
    return KVPool(pool_k, pool_v, kv_pool.num_layers)

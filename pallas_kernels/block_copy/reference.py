"""What the block moves mean: the oracles of every other implementation. Block ids must have known values."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool


def copy_blocks_reference(kv_pool: KVPool, sources: jax.Array, targets: jax.Array) -> KVPool:
    """Out of the pool, then into it; arguments as in ``copy_blocks``."""
    return scatter_blocks_reference(kv_pool, targets, *gather_blocks_reference(kv_pool, sources))


def gather_blocks_reference(kv_pool: KVPool, block_ids: jax.Array) -> tuple[jax.Array, ...]:
    """Block by block; arguments as in ``gather_blocks``."""
    places = [
        [layer * kv_pool.num_blocks + i for i in block_ids.tolist()] for layer in range(kv_pool.num_layers)
    ]
    return tuple(jnp.stack([jnp.stack([pool[i] for i in row]) for row in places]) for pool in kv_pool.arrays)


def scatter_blocks_reference(kv_pool: KVPool, block_ids: jax.Array, *contents: jax.Array) -> KVPool:
    """Block by block; arguments as in ``scatter_blocks``."""
    pools = list(kv_pool.arrays)
    for layer in range(kv_pool.num_layers):
        for i, block_id in enumerate(block_ids.tolist()):
            block = layer * kv_pool.num_blocks + block_id
            pools = [
                pool.at[block].set(new[layer, i].astype(pool.dtype))
                for pool, new in zip(pools, contents, strict=True)
            ]
    return kv_pool.with_arrays(pools)

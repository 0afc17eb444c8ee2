"""What cache scatter means: the oracle of every other implementation."""

import jax

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.cache_scatter.encode import encoded


def cache_scatter_reference(
    kv_pool: KVPool, k: jax.Array, v: jax.Array, layer: int, slots: jax.Array
) -> KVPool:
    """Token by token; arguments as in ``cache_scatter``, ``slots`` with known values."""
    pools, new = list(kv_pool.arrays), encoded(kv_pool, k, v)
    for token, slot in enumerate(slots.tolist()):
        block, offset = layer * kv_pool.num_blocks + slot // kv_pool.block_size, slot % kv_pool.block_size
        pools = [pool.at[block, :, offset].set(x[token]) for pool, x in zip(pools, new, strict=True)]
    return kv_pool.with_arrays(pools)

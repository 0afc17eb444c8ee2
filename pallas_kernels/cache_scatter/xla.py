"""Cache scatter in plain JAX: XLA's scatter, in place under donation on every device."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.cache_scatter.encode import encoded
from jaxpaged.pallas_kernels.pool_moves import scattered


def cache_scatter_xla(kv_pool: KVPool, k: jax.Array, v: jax.Array, layer: int, slots: jax.Array) -> KVPool:
    """One scatter for keys, one for values, and as many for scales; arguments as in ``cache_scatter``."""
    block_size = kv_pool.block_size
    blocks, offsets = layer * kv_pool.num_blocks + slots // block_size, slots % block_size
    heads, zeros = jnp.arange(k.shape[1])[None, :], jnp.zeros_like(slots)
    starts = jnp.stack([blocks, zeros, offsets, zeros], axis=1)

    def write(pool: jax.Array, new: jax.Array) -> jax.Array:
        def scatter(pool: jax.Array) -> jax.Array:
            return pool.at[blocks[:, None], heads, offsets[:, None]].set(new, mode="promise_in_bounds")

        return scattered(pool, scatter, starts, new[:, None, :, None])

    pools = zip(kv_pool.arrays, encoded(kv_pool, k, v), strict=True)
    return kv_pool.with_arrays([write(pool, new) for pool, new in pools])

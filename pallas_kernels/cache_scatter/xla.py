"""Cache scatter in plain JAX: XLA's scatter, in place under donation on every device."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.cache_scatter.encode import encoded


def cache_scatter_xla(kv_pool: KVPool, k: jax.Array, v: jax.Array, layer: int, slots: jax.Array) -> KVPool:
    """One scatter for keys, one for values, and as many for scales; arguments as in ``cache_scatter``."""
    block_size = kv_pool.block_size
    blocks = (layer * kv_pool.num_blocks + slots // block_size)[:, None]
    heads, offsets = jnp.arange(k.shape[1])[None, :], (slots % block_size)[:, None]

    def write(pool: jax.Array, new: jax.Array) -> jax.Array:
        return pool.at[blocks, heads, offsets].set(new, mode="promise_in_bounds")

    pools = zip(kv_pool.arrays, encoded(kv_pool, k, v), strict=True)
    return kv_pool.with_arrays([write(pool, new) for pool, new in pools])

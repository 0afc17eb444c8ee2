"""Block moves in plain JAX: XLA's gather and scatter, in place under donation on every device."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool


def copy_blocks_xla(kv_pool: KVPool, sources: jax.Array, targets: jax.Array) -> KVPool:
    """A gather and a scatter; arguments as in ``copy_blocks``."""
    return scatter_blocks_xla(kv_pool, targets, *gather_blocks_xla(kv_pool, sources))


def gather_blocks_xla(kv_pool: KVPool, block_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Arguments as in ``gather_blocks``."""
    entries = _entries(kv_pool, block_ids)
    return kv_pool.k[entries], kv_pool.v[entries]


def scatter_blocks_xla(kv_pool: KVPool, block_ids: jax.Array, k: jax.Array, v: jax.Array) -> KVPool:
    """Arguments as in ``scatter_blocks``."""
    entries = _entries(kv_pool, block_ids)

    def write(pool: jax.Array, new: jax.Array) -> jax.Array:
        return pool.at[entries].set(new.astype(pool.dtype))

    return KVPool(write(kv_pool.k, k), write(kv_pool.v, v), kv_pool.num_layers)


def _entries(kv_pool: KVPool, block_ids: jax.Array) -> jax.Array:
    """int32 ``[L, P]``, where the blocks of each layer lie.

    Indices into the pool as it is: reshaped to ``[L, N, ...]`` XLA:GPU moves the layers inwards, by copying all of it.
    """
    layers = jnp.arange(kv_pool.num_layers, dtype=jnp.int32)
    return layers[:, None] * kv_pool.num_blocks + block_ids[None, :]

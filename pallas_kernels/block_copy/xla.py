"""Block moves in plain JAX: XLA's gather and scatter, in place under donation on every device."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.pool_moves import scattered


def copy_blocks_xla(kv_pool: KVPool, sources: jax.Array, targets: jax.Array) -> KVPool:
    """A gather and a scatter; arguments as in ``copy_blocks``."""
    return scatter_blocks_xla(kv_pool, targets, *gather_blocks_xla(kv_pool, sources))


def gather_blocks_xla(kv_pool: KVPool, block_ids: jax.Array) -> tuple[jax.Array, ...]:
    """Arguments as in ``gather_blocks``."""
    entries = _entries(kv_pool, block_ids)
    return tuple(pool[entries] for pool in kv_pool.arrays)


def scatter_blocks_xla(kv_pool: KVPool, block_ids: jax.Array, *contents: jax.Array) -> KVPool:
    """Arguments as in ``scatter_blocks``."""
    entries = _entries(kv_pool, block_ids)
    starts = jnp.pad(entries.reshape(-1, 1), ((0, 0), (0, 3)))

    def write(pool: jax.Array, new: jax.Array) -> jax.Array:
        boxes = new.astype(pool.dtype).reshape(-1, 1, *pool.shape[1:])
        return scattered(pool, lambda pool: pool.at[entries].set(new.astype(pool.dtype)), starts, boxes)

    return kv_pool.with_arrays([write(pool, new) for pool, new in zip(kv_pool.arrays, contents, strict=True)])


def _entries(kv_pool: KVPool, block_ids: jax.Array) -> jax.Array:
    """int32 ``[L, P]``, where the blocks of each layer lie.

    Indices into the pool as it is: reshaped to ``[L, N, ...]`` XLA:GPU moves the layers inwards, by copying all of it.
    """
    layers = jnp.arange(kv_pool.num_layers, dtype=jnp.int32)
    return layers[:, None] * kv_pool.num_blocks + block_ids[None, :]

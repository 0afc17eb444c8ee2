"""Block moves in plain JAX: XLA's gather and scatter, in place under donation on every device."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool


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
    pools = zip(kv_pool.arrays, contents, strict=True)
    return kv_pool.with_arrays([pool.at[entries].set(new.astype(pool.dtype)) for pool, new in pools])


def _entries(kv_pool: KVPool, block_ids: jax.Array) -> jax.Array:
    """int32 ``[L, P]``, where the blocks of each layer lie.

    Indices into the pool as it is: reshaped to ``[L, N, ...]`` XLA:GPU moves the layers inwards, by copying all of it.
    """
    layers = jnp.arange(kv_pool.num_layers, dtype=jnp.int32)
    return layers[:, None] * kv_pool.num_blocks + block_ids[None, :]

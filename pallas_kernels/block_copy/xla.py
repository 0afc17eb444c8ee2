"""Block moves in plain JAX: XLA's gather and scatter, in place under donation on every device."""

import jax

from jaxpaged.pallas_kernels.batch import KVPool


def copy_blocks_xla(kv_pool: KVPool, sources: jax.Array, targets: jax.Array) -> KVPool:
    """A gather and a scatter; arguments as in ``copy_blocks``."""
    return scatter_blocks_xla(kv_pool, targets, *gather_blocks_xla(kv_pool, sources))


def gather_blocks_xla(kv_pool: KVPool, block_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Arguments as in ``gather_blocks``."""
    return _layered(kv_pool, kv_pool.k)[:, block_ids], _layered(kv_pool, kv_pool.v)[:, block_ids]


def scatter_blocks_xla(kv_pool: KVPool, block_ids: jax.Array, k: jax.Array, v: jax.Array) -> KVPool:
    """Arguments as in ``scatter_blocks``."""

    def write(pool: jax.Array, new: jax.Array) -> jax.Array:
        written = _layered(kv_pool, pool).at[:, block_ids].set(new.astype(pool.dtype))
        return written.reshape(pool.shape)

    return KVPool(write(kv_pool.k, k), write(kv_pool.v, v), kv_pool.num_layers)


def _layered(kv_pool: KVPool, pool: jax.Array) -> jax.Array:
    """``[L, N, Hkv, S, D]``, no copy."""
    return pool.reshape(kv_pool.num_layers, kv_pool.num_blocks, *pool.shape[1:])

"""Blocks of the pool as numbers, for the implementations in plain JAX."""

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.quantisation import codes_of


def read_blocks(kv_pool: KVPool, entries: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of blocks: ``[..., Hkv, S, D]``, float32 of a quantised pool, else in its dtype.

    Args:
      kv_pool: see ``KVPool``.
      entries: int32 ``[...]``, in ``[0, L*N)``.
    """

    def read(pool: jax.Array, scale: jax.Array | None) -> jax.Array:
        stored = pool.at[entries].get(mode="promise_in_bounds")
        if scale is None:
            return stored
        factor = scale.at[entries].get(mode="promise_in_bounds")
        return codes_of(stored, jnp.float32) * factor[..., None]

    return read(kv_pool.k, kv_pool.k_scale), read(kv_pool.v, kv_pool.v_scale)

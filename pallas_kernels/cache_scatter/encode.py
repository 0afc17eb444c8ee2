"""New keys and values as the pool keeps them."""

import jax

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.quantisation import quantise


def encoded(kv_pool: KVPool, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """What goes into each of ``kv_pool.arrays`` for k and v ``[T, Hkv, D]``: ``[T, Hkv, ...]``, of its dtype."""
    kind = kv_pool.format
    if kind is None:
        return k.astype(kv_pool.k.dtype), v.astype(kv_pool.v.dtype)
    (k_codes, k_scale), (v_codes, v_scale) = quantise(k, kind), quantise(v, kind)
    return k_codes, v_codes, k_scale, v_scale

"""Inputs of attention over quantised pools, and what these hold as numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpaged.pallas_kernels import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.paged_attention.cases import Case, make_inputs
from jaxpaged.pallas_kernels.quantisation import KVFormat, dequantise, quantise

Inputs = tuple[jax.Array, KVPool, AttentionBatch]


def quantised_inputs(case: Case, kind: KVFormat, dtype: str, seed: int = 0) -> Inputs:
    """Slots that no token owns have NaN for a scale, and codes of ones, which is NaN in e4m3."""
    q, pool, batch = make_inputs(case, seed, poison=np.nan)
    unused = jnp.isnan(pool.k[..., 0])
    ones = lax.bitcast_convert_type(jnp.uint8(255), kind.storage)

    def poisoned(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, scale = quantise(vectors, kind)
        return jnp.where(unused[..., None], ones, codes), jnp.where(unused, jnp.nan, scale)

    (k, k_scale), (v, v_scale) = poisoned(pool.k), poisoned(pool.v)
    return q.astype(dtype), KVPool(k, v, pool.num_layers, k_scale, v_scale), batch


def numbers_of(pool: KVPool) -> KVPool:
    """A quantised pool in float32."""
    assert pool.k_scale is not None
    assert pool.v_scale is not None
    return KVPool(dequantise(pool.k, pool.k_scale), dequantise(pool.v, pool.v_scale), pool.num_layers)

"""Block copy: what copy-on-write needs, over all layers at once."""

import jax

from jaxpaged.pallas_kernels.batch import KVPool


def copy_blocks(kv_pool: KVPool, sources: jax.Array, targets: jax.Array) -> KVPool:
    """Copies whole blocks inside the pool, in every layer; in place when the pool is donated.

    All sources are read before any target is written.

    Args:
      kv_pool: see ``KVPool``.
      sources, targets: int32 ``[P]``, block ids; pad with 0 (the dummy block onto itself). Targets other than
        0 are distinct.

    Returns:
      The pool after the copies.

    Raises:
      ValueError: shapes that differ.
    """
    if sources.ndim != 1 or sources.shape != targets.shape:
        raise ValueError(
            f"copy_blocks: sources.shape={sources.shape}, targets.shape={targets.shape} must be one [P]"
        )

    def copy(pool: jax.Array) -> jax.Array:
        layered = pool.reshape(kv_pool.num_layers, kv_pool.num_blocks, *pool.shape[1:])
        layered = layered.at[:, targets].set(layered[:, sources])
        return layered.reshape(pool.shape)

    return KVPool(copy(kv_pool.k), copy(kv_pool.v), kv_pool.num_layers)

"""Cache scatter: the keys and values of a step go to their slots of the pool, in place."""

from collections.abc import Callable

import jax

from jaxpaged.pallas_kernels.batch import KVPool, MixedKVPool
from jaxpaged.pallas_kernels.cache_scatter.reference import cache_scatter_reference
from jaxpaged.pallas_kernels.cache_scatter.xla import cache_scatter_xla
from jaxpaged.pallas_kernels.pool_moves import best_implementation


def _mosaic_gpu(kv_pool: KVPool, k: jax.Array, v: jax.Array, layer: int, slots: jax.Array) -> KVPool:
    # Imported where it is used: Mosaic GPU takes a quarter of a second to load.
    from jaxpaged.pallas_kernels.cache_scatter.mosaic_gpu import cache_scatter_mosaic_gpu

    return cache_scatter_mosaic_gpu(kv_pool, k, v, layer, slots)


IMPLEMENTATIONS: dict[str, Callable[[KVPool, jax.Array, jax.Array, int, jax.Array], KVPool]] = {
    "reference": cache_scatter_reference,
    "xla": cache_scatter_xla,
    "mosaic_gpu": _mosaic_gpu,
}


def cache_scatter[Pool: (KVPool, MixedKVPool)](
    kv_pool: Pool,
    k: jax.Array,
    v: jax.Array,
    layer: int,
    slots: jax.Array,
    *,
    implementation: str | None = None,
) -> Pool:
    """Writes one key and value per token into the pool, quantised as the layer's format says.

    In place when the pool's buffers are donated to the surrounding program; a test reads the compiled memory
    analysis. Padding tokens carry slot 0. What the dummy block holds afterwards is up to the implementation;
    nothing else that has no slot here is touched.

    Args:
      kv_pool: see ``KVPool`` and ``MixedKVPool``.
      k, v: float ``[T, Hkv, D]``, cast to the pool's dtype or quantised (``quantisation``).
      layer: which layer of the pool.
      slots: int32 ``[T]``, ``block_id * S + offset``; the host checks their range. Those outside the dummy block
        are distinct.
      implementation: ``"reference"`` (outside of jit only), ``"xla"``, ``"mosaic_gpu"``, or None for the best one
        here.

    Returns:
      The pool after the writes.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, a layer out of range.
      NotImplementedError: a named implementation cannot take this call; it says why and never falls back.
    """
    if not 0 <= layer < kv_pool.num_layers:
        raise ValueError(f"cache_scatter: layer={layer} is not in [0, {kv_pool.num_layers})")
    part, index = kv_pool.part_of(layer)
    heads = part.num_kv_heads, part.head_dim
    if k.shape != v.shape or k.shape[1:] != heads or slots.shape != k.shape[:1]:
        raise ValueError(
            f"cache_scatter: k.shape={k.shape}, v.shape={v.shape}, slots.shape={slots.shape} do not fit a pool with "
            f"(Hkv, D)={heads}"
        )
    if implementation is None:
        implementation = best_implementation("cache_scatter", part)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"cache_scatter: implementation={implementation!r} is none of {sorted(IMPLEMENTATIONS)}"
        )
    written = IMPLEMENTATIONS[implementation](part, k, v, index, slots)
    return kv_pool.with_part(layer, written)

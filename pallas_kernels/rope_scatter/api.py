"""Rotary embedding and cache scatter: from a layer's projection to rotated queries and the written pool."""

from collections.abc import Callable
from functools import partial

import jax

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.rope_scatter.xla import rope_scatter_xla


def _mosaic_gpu(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, kv_pool: KVPool, layer: int, slots: jax.Array
) -> tuple[jax.Array, KVPool]:
    # Imported where it is used: Mosaic GPU takes a quarter of a second to load.
    from jaxpaged.pallas_kernels.rope_scatter.mosaic_gpu import rope_scatter_mosaic_gpu

    return rope_scatter_mosaic_gpu(qkv, cos, sin, kv_pool, layer, slots)


IMPLEMENTATIONS: dict[str, Callable[..., tuple[jax.Array, KVPool]]] = {
    "reference": partial(rope_scatter_xla, scatter="reference"),
    "xla": rope_scatter_xla,
    "mosaic_gpu": _mosaic_gpu,
}


def rope_scatter(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv_pool: KVPool,
    layer: int,
    slots: jax.Array,
    *,
    implementation: str = "xla",
) -> tuple[jax.Array, KVPool]:
    """Rotates queries and keys and writes keys and values to their slots (Su et al. 2021, arXiv:2104.09864).

    The pool is updated in place when it is donated, under the rules of ``cache_scatter``: slot 0 is padding, the others
    are distinct.

    Args:
      qkv: float ``[T, Hkv, G + 2, D]``: for each key/value head its G query heads, its key and its value, not rotated.
      cos, sin: float32 ``[T, D/2]``, of each token's position.
      kv_pool: see ``KVPool``.
      layer: which layer of the pool.
      slots: int32 ``[T]``, ``block_id * S + offset``.
      implementation: ``"reference"`` (outside of jit only), ``"xla"`` (the rotation by XLA, the scatter as is best for
        the device) or ``"mosaic_gpu"`` (both in one launch).

    Returns:
      The rotated queries ``[T, Hkv * G, D]`` in qkv's dtype, and the pool after the writes.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, a layer out of range.
      NotImplementedError: the implementation cannot take this call; it says why and never falls back.
    """
    _, num_kv_heads, _, head_dim = kv_pool.k.shape
    num_tokens = qkv.shape[0]
    fits = qkv.ndim == 4 and qkv.shape[1] == num_kv_heads and qkv.shape[2] > 2 and qkv.shape[3] == head_dim
    table = (num_tokens, head_dim // 2)
    if not fits or cos.shape != table or sin.shape != table or slots.shape != (num_tokens,):
        raise ValueError(
            f"rope_scatter: qkv.shape={qkv.shape}, cos.shape={cos.shape}, sin.shape={sin.shape}, "
            f"slots.shape={slots.shape} do not fit kv_pool.k.shape={kv_pool.k.shape}"
        )
    if not 0 <= layer < kv_pool.num_layers:
        raise ValueError(f"rope_scatter: layer={layer} is not in [0, {kv_pool.num_layers})")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"rope_scatter: implementation={implementation!r} is none of {sorted(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation](qkv, cos, sin, kv_pool, layer, slots)

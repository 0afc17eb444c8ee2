"""Joins the partial results of a tile's items, and takes the sinks in.

Grid: (tiles, kv heads, D / 32). A thread block reads 32 columns of each partial result, ``BATCH`` at a time so that
their loads overlap, and keeps one online softmax over the items, in their order: the same items give the same
bits. Padding tiles have no items and write zeros.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.mosaic_gpu import kernel, store_global
from jaxpaged.pallas_kernels.paged_attention.mosaic_tile import LOG2E
from jaxpaged.pallas_kernels.variant import MASKED

COLUMNS = 32
BATCH = 8


def combine(
    partials: jax.Array,
    log_sums: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    sinks: jax.Array | None,
    dtype: Any,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Joins the items of every tile.

    Args:
      partials: float32 ``[W, Hkv, M, D]``; log_sums float32 ``[W, Hkv, M]``, base 2.
      starts, counts: int32 ``[P]``, the tile's items.
      sinks: float32 ``[Hkv, M]``, natural, one logit for each row, or None.
      dtype: of the result.

    Returns:
      ``[P, Hkv, M, D]``.
    """
    _, num_kv_heads, tile_m, head_dim = partials.shape
    num_tiles = starts.shape[0]
    extra = () if sinks is None else (sinks,)
    run = kernel(
        "paged_attention_combine",
        partial(_body, len(extra)),
        out_type=jax.ShapeDtypeStruct((num_tiles, num_kv_heads, tile_m, head_dim), dtype),
        grid=(num_tiles, num_kv_heads, head_dim // COLUMNS),
        grid_names=("tile", "head", "column"),
        interpret=interpret,
    )
    joined: jax.Array = run(partials, log_sums, starts, counts, *extra)
    return joined


def _body(has_sinks: int, partials: Any, log_sums: Any, starts: Any, counts: Any, *rest: Any) -> None:
    out = rest[has_sinks]
    tile, head = lax.axis_index("tile"), lax.axis_index("head")
    columns = pl.ds(lax.axis_index("column") * COLUMNS, COLUMNS)
    tile_m = partials.shape[2]
    layout = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=tile_m // 16)
    row = layout.reduce(1)
    first, count = starts[tile], counts[tile]
    full = lambda value: plgpu.layout_cast(jnp.full((tile_m,), value, jnp.float32), row)  # noqa: E731
    if has_sinks:
        top, total = plgpu.load(rest[0].at[head], layout=row, optimized=False) * LOG2E, full(1.0)
    else:
        top, total = full(MASKED), full(0.0)
    acc = plgpu.layout_cast(jnp.zeros((tile_m, COLUMNS), jnp.float32), layout)

    def batch(i: Any, carry: Any) -> Any:
        acc, top, total = carry
        parts, logs = [], []
        for j in range(BATCH):
            index = i * BATCH + j
            at = first + jnp.minimum(index, count - 1)
            parts.append(plgpu.load(partials.at[at, head, :, columns], layout=layout, optimized=False))
            log = plgpu.load(log_sums.at[at, head], layout=row, optimized=False)
            logs.append(
                log + jnp.where(index < count, 0.0, 2 * MASKED)
            )  # past the last: below all that counts
        new_top = top
        for log in logs:
            new_top = jnp.maximum(new_top, log)
        decay = jnp.exp2(top - new_top)
        acc, total = acc * lax.broadcast_in_dim(decay, acc.shape, [0]), total * decay
        for part, log in zip(parts, logs, strict=True):
            # An item that saw no key weighs nothing, also where no other item saw one.
            weight = jnp.where(log > MASKED, jnp.exp2(log - new_top), 0.0)
            acc = acc + part * lax.broadcast_in_dim(weight, acc.shape, [0])
            total = total + weight
        return acc, new_top, total

    acc, top, total = lax.fori_loop(
        0, lax.div(count + (BATCH - 1), jnp.int32(BATCH)), batch, (acc, top, total)
    )
    safe = jnp.where(total == 0.0, 1.0, total)
    joined = acc / lax.broadcast_in_dim(safe, acc.shape, [0])
    store_global(out.at[tile, head, :, columns], joined.astype(out.dtype))

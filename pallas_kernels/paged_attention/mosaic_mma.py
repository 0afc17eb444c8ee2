"""Attention with warp-level matrix products (``mma.sync``): one source from Ampere to Blackwell.

One warpgroup a thread block. The M rows of the products are the query heads of the kv head, for each query token of
the tile. Scores: the four warps split the keys. Values: they split the head dimension, so weights pass through shared
memory, as does the maximum over keys; sums of weights stay with their threads until the end. Each step reads
``tile_kv`` keys and values from a ring of ``stages`` buffers that copies fill ``stages - 1`` steps ahead. The ids of
the blocks to copy are read one step earlier still, so that no copy waits for the block table.

Shared memory is swizzled by the compiler and operands come by ``ldmatrix``: no bank conflicts. Products of bfloat16
or float16 accumulate in float32; softmax is float32; weights are rounded to the queries' dtype. Partial results are
float32, and ``mosaic_combine`` joins them. Method: FlashAttention-2 (arXiv:2307.08691) with the heads of a group as
rows.

Codes of a quantised pool become operands in the registers that ``ldmatrix`` brought them to (``mosaic_codes``), so that
shared memory is written and read once for each byte of the pool. A key's scale multiplies its scores before anything
else does, a value's its weights before they are rounded; sums of weights are without it.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.paged_attention.mosaic_launch import ForItems, KernelRefs
from jaxpaged.pallas_kernels.paged_attention.mosaic_ring import Ring, ring_scratch
from jaxpaged.pallas_kernels.paged_attention.mosaic_tile import (
    Item,
    TileShape,
    clear_unseen,
    first_key,
    has_unseen_keys,
    modify,
    normalised,
    operands_of,
    softmax_weights,
)
from jaxpaged.pallas_kernels.variant import MASKED


class MMA:
    """The portable form; see ``mosaic_launch.Form``."""

    def scratch(self, shape: TileShape, dtype: Any, interpreted: bool) -> list[Any]:
        """The weights' buffer and the ring."""
        del interpreted
        return [plgpu.SMEM((shape.tile_m, shape.config.tile_kv), dtype), *ring_scratch(shape, dtype)]

    def threads(self) -> dict[str, Any]:
        """One warpgroup."""
        return {}

    def body(self, shape: TileShape, refs: KernelRefs, for_items: ForItems) -> None:
        """Attends this thread block's items."""
        for_items(lambda item: _attend(shape, refs, item))


def _attend(shape: TileShape, refs: KernelRefs, item: Item) -> None:
    tile_m, tile_kv, width = shape.tile_m, shape.config.tile_kv, shape.ring_width
    dtype, ahead = refs.q.dtype, shape.config.stages - 1
    layouts = (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
    lhs, rhs, accumulator = (layout(dtype, m_warps=tile_m // 16) for layout in layouts)
    value_layout = plgpu.Layout.MMA_ACC(dtype, m_warps=2)
    weights_ref, ring = refs.scratch[0], Ring(shape, refs, item, refs.scratch[1:])
    zeros = lambda *extent: plgpu.layout_cast(jnp.zeros(extent, jnp.float32), accumulator)  # noqa: E731

    ring.before_reuse()
    for early in range(ahead):
        ring.issue(jnp.int32(early), ring.ids(jnp.int32(early)))
    columns = range(0, shape.head_dim, width)
    queries = [
        plgpu.load(refs.q.at[item.tile, refs.head, :, pl.ds(first, width)], layout=lhs, optimized=False)
        for first in columns
    ]
    top = plgpu.layout_cast(jnp.full((tile_m,), MASKED, jnp.float32), accumulator.reduce(1))
    accs = [zeros(tile_m, width) for _ in columns]
    start = accs, top, zeros(tile_m, tile_kv), ring.ids(jnp.int32(ahead)), ring.first_scales()

    operands = operands_of(shape, item, refs.head, refs.operands, accumulator)

    def step(i: Any, carry: Any) -> Any:
        accs, top, totals, ids, scales = carry
        slot = ring.slot(i)
        ring.before_reuse()
        ring.issue(i + ahead, ids)
        ids = ring.ids(i + (ahead + 1))
        scales = ring.next_scales(i, scales)
        loaded = operands.at(first_key(shape, item, i))
        ring.wait_keys(i)
        scores = zeros(tile_m, tile_kv)
        for some, keys in zip(queries, ring.operands(ring.keys.at[slot].T, rhs), strict=True):
            scores = plgpu.mma(scores, some, keys)
        scores = ring.scaled_by_keys(i, scores, accumulator)
        scores, visible = modify(shape, item, i, refs.head, scores, loaded, accumulator)
        weights, decay, top = softmax_weights(scores, visible, top)
        totals = totals * lax.broadcast_in_dim(decay, totals.shape, [0]) + weights
        weights_ref[...] = ring.scaled_for_values(i, weights, accumulator).astype(dtype)
        ring.wait_values(i)

        if shape.kind is None:  # codes are never NaN

            @pl.when(has_unseen_keys(shape, item, i))
            def _() -> None:
                clear_unseen(shape, item, i, ring.values.at[slot], value_layout)

        operands_of_values = ring.operands(ring.values.at[slot], rhs)
        packed = plgpu.load(weights_ref, layout=lhs, optimized=False)
        accs = [
            plgpu.mma(acc * lax.broadcast_in_dim(decay, acc.shape, [0]), packed, values)
            for acc, values in zip(accs, operands_of_values, strict=True)
        ]
        return accs, top, totals, ids, scales

    accs, top, totals, *_ = lax.fori_loop(0, item.steps, step, start)
    ring.finish()
    total = totals.sum(axis=1)
    results, log_sums = zip(*(normalised(acc, top, total) for acc in accs), strict=True)
    refs.store(item, results, log_sums[0])

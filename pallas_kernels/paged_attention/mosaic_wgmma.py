"""Attention with warpgroup-level matrix products (``wgmma``) on Hopper: a warpgroup that copies, one that computes.

The 64 rows of the products are the query heads of the kv head for each query token of the tile: with four heads, 16
tokens, or one and 60 rows of padding. The copying warpgroup gives its registers to the other and runs ahead by as
many steps as the ring has slots; a slot is free again when the values' product has read it. Keys and values go from
shared memory straight into the products, weights come from registers, and maxima and sums never leave their warp:
a row belongs to four threads.

Codes of a quantised pool are written to shared memory as numbers, one tile at a time, because that is where these
products take them from.

Numerics as in ``mosaic_mma``. Method: FlashAttention-3 (arXiv:2407.08608), without its second consumer.
"""

import math
from collections.abc import Sequence
from functools import partial
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

_COMPUTE, _COPY = 0, 1
# Registers of a thread: the least that "setmaxnreg" allows (PTX ISA), and what head_dim 256 takes without spilling.
_COPY_REGISTERS, _COMPUTE_REGISTERS = 24, 240
# Copies of scales, or of the tiles of a list, have addresses of their own.
_COPY_MORE_REGISTERS = 56
# Columns of words that are in registers at a time: what of each part is one swizzled line of 128 bytes.
_WORDS = 64


class WGMMA:
    """The Hopper form; see ``mosaic_launch.Form``."""

    def scratch(self, shape: TileShape, dtype: Any, interpreted: bool) -> list[Any]:
        """Queries, their barrier, the slots' releases, the ring, codes as numbers, the interpreter's weights."""
        queries = plgpu.SMEM((shape.tile_m, shape.head_dim), dtype)
        released = plgpu.Barrier(num_barriers=shape.config.stages)
        # The interpreter takes the left operand from shared memory only.
        weights = [plgpu.SMEM((shape.tile_m, shape.config.tile_kv), dtype)] * interpreted
        numbers = [plgpu.SMEM((shape.config.tile_kv, shape.head_dim), dtype)] * (shape.kind is not None)
        return [queries, plgpu.Barrier(), released, *ring_scratch(shape, dtype), *numbers, *weights]

    def threads(self) -> dict[str, Any]:
        """Two warpgroups."""
        return {"num_threads": 2, "thread_name": "warpgroup"}

    def body(self, shape: TileShape, refs: KernelRefs, for_items: ForItems) -> None:
        """Copies or attends, each for all items of this thread block."""

        @pl.when(lax.axis_index("warpgroup") == _COPY)
        def _() -> None:
            has_more = shape.kind is not None or shape.mods.mask_mod is not None  # scales, or lists of tiles
            registers = _COPY_MORE_REGISTERS if has_more else _COPY_REGISTERS
            plgpu.set_max_registers(registers, action="decrease")
            for_items(lambda item: _copy(shape, refs, item))

        @pl.when(lax.axis_index("warpgroup") == _COMPUTE)
        def _() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            for_items(lambda item: _attend(shape, refs, item))


def _copy(shape: TileShape, refs: KernelRefs, item: Item) -> None:
    released, ring = refs.scratch[2], Ring(shape, refs, item, refs.scratch[3:])
    stages = shape.config.stages

    def step(i: Any, ids: list[Any]) -> list[Any]:
        later = ring.ids(i + 1)

        @pl.when(i >= stages)
        def _() -> None:
            plgpu.barrier_wait(released.at[ring.slot(i)])

        ring.issue(i, ids)
        return later

    lax.fori_loop(0, item.steps, step, ring.ids(jnp.int32(0)))
    # The last releases too: the next item begins with all slots free.
    for slot in range(stages):
        pl.when(slot < item.steps)(partial(plgpu.barrier_wait, released.at[slot]))


def _attend(shape: TileShape, refs: KernelRefs, item: Item) -> None:
    q_ref, q_barrier, released = refs.scratch[:3]
    ring = Ring(shape, refs, item, refs.scratch[3:])
    numbers, weights_ref = (None, ring.others) if shape.kind is None else (ring.others[0], ring.others[1:])
    tile_m, head_dim, tile_kv = shape.tile_m, shape.head_dim, shape.config.tile_kv
    dtype, layout = refs.q.dtype, plgpu.Layout.WGMMA
    plgpu.copy_gmem_to_smem(refs.q.at[item.tile, refs.head], q_ref, q_barrier)
    plgpu.barrier_wait(q_barrier)
    fill = lambda value, to, *extent: plgpu.layout_cast(jnp.full(extent, value, jnp.float32), to)  # noqa: E731
    row = layout.reduce(1)
    start = fill(0.0, layout, tile_m, head_dim), fill(MASKED, row, tile_m), fill(0.0, row, tile_m)

    operands = operands_of(shape, item, refs.head, refs.operands, layout)

    def step(i: Any, carry: Any) -> Any:
        acc, top, total = carry
        slot = ring.slot(i)
        loaded = operands.at(first_key(shape, item, i))
        ring.wait_keys(i)
        keys = to_multiply(ring, ring.keys.at[slot], numbers)

        def product_with_keys(scores: Any) -> Any:
            plgpu.wgmma(scores, q_ref, keys.T)
            return scores[...]

        scores = pl.run_scoped(product_with_keys, plgpu.WGMMAAccumulatorRef((tile_m, tile_kv), jnp.float32))
        scores = ring.scaled_by_keys(i, scores, layout)
        scores, visible = modify(shape, item, i, refs.head, scores, loaded, layout)
        weights, decay, top = softmax_weights(scores, visible, top)
        total = total * decay + weights.sum(axis=1)
        packed = ring.scaled_for_values(i, weights, layout).astype(dtype)
        ring.wait_values(i)

        if shape.kind is None:  # codes are never NaN

            @pl.when(has_unseen_keys(shape, item, i))
            def _() -> None:
                clear_unseen(shape, item, i, ring.values.at[slot], layout)
                plgpu.commit_smem()

        values = to_multiply(ring, ring.values.at[slot], numbers)
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        acc = add_product(acc, packed, weights_ref, values)
        plgpu.barrier_arrive(released.at[slot])
        return acc, top, total

    acc, top, total = lax.fori_loop(0, item.steps, step, start)
    result, log_sum = normalised(acc, top, total)
    refs.store(item, [result], log_sum)


def to_multiply(ring: Ring, tile: Any, numbers: Any) -> Any:
    """A tile of keys or values where products can read it: where it is, or in ``numbers`` if it holds codes."""
    if numbers is None:
        return tile
    width = ring.shape.ring_width
    some = math.gcd(width, _WORDS)
    for first in range(0, width, some):
        parts = ring.operands(tile.at[:, pl.ds(first, some)], plgpu.Layout.WGMMA)
        for place, part in enumerate(parts):
            numbers[:, pl.ds(place * width + first, some)] = part
    plgpu.commit_smem()
    return numbers


def add_product(acc: Any, weights: Any, staging: Sequence[Any], values: Any) -> Any:
    """``acc + weights @ values``. With ``staging``, for the interpreter, weights go through shared memory."""
    if staging:
        staging[0][...] = weights
        plgpu.commit_smem()

        def product(sums: Any) -> Any:
            plgpu.wgmma(sums, staging[0], values)
            return sums[...]

        return acc + pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(acc.shape, jnp.float32))

    def add(sums: Any) -> None:
        plgpu.wgmma(sums, weights, values)

    return pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc))

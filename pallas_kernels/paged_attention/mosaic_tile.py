"""Pieces of the attention kernels that both forms share: what is static, which blocks to copy, masks, softmax.

Scores live in base 2: ``exp2`` is one instruction, and ``log2(e)`` folds into the scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.hoisting import accurate_tanh
from jaxpaged.pallas_kernels.paged_attention.mosaic_codes import ring_width
from jaxpaged.pallas_kernels.paged_attention.mosaic_operands import KernelMods, LoadedOperands
from jaxpaged.pallas_kernels.paged_attention.mosaic_plan import (
    BEGIN,
    END,
    FIRST_POS,
    LAST_KEY,
    LAST_POS,
    PART,
    ROW,
    TILE,
    TOKEN,
)
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig
from jaxpaged.pallas_kernels.quantisation import KVFormat
from jaxpaged.pallas_kernels.variant import MASKED

LOG2E = math.log2(math.e)

# Columns of values that are in registers at a time when unseen ones are cleared: one swizzled line of 128 bytes.
_CLEARED_COLUMNS = 64


@dataclass(frozen=True)
class TileShape:
    """What is static in a launch."""

    config: MosaicConfig
    tile_m: int
    tile_q: int
    group: int
    head_dim: int
    block_size: int
    scale: float
    logit_soft_cap: float | None
    sliding_window: int | None
    mods: KernelMods
    has_tma: bool
    kind: KVFormat | None = None
    interpreted: bool = False

    @property
    def ring_width(self) -> int:
        """Elements of a row of keys or values as they are copied: D, or words of codes."""
        return ring_width(self.head_dim, self.kind)

    @property
    def blocks_per_tile(self) -> int:
        """Copies that fill one tile of keys; a tile never spans part of a block and another."""
        return max(1, self.config.tile_kv // self.block_size)

    @property
    def copy_rows(self) -> int:
        """Keys that one copy brings."""
        return min(self.config.tile_kv, self.block_size)


@dataclass(frozen=True)
class Item:
    """The item of this thread block: int32 scalars, see ``mosaic_plan``."""

    index: Any
    row: Any
    tile: Any
    first_pos: Any
    last_pos: Any
    begin: Any
    steps: Any
    token: Any
    part: Any
    last_key: Any
    key_tiles: Any  # a reference, or None: see ``WorkPlan``


def read_item(items_ref: Any, index: Any, key_tiles: Any = None) -> Item:
    """Reads one line of the work list; ``key_tiles`` is the reference of the plan's, if it has them."""
    field = lambda column: items_ref[index, column]  # noqa: E731
    begin = field(BEGIN)
    return Item(
        index=index,
        row=field(ROW),
        tile=field(TILE),
        first_pos=field(FIRST_POS),
        last_pos=field(LAST_POS),
        begin=begin,
        steps=field(END) - begin,
        token=field(TOKEN),
        part=field(PART),
        last_key=field(LAST_KEY),
        key_tiles=None if key_tiles is None else key_tiles.at[field(TILE)],
    )


def first_key(shape: TileShape, item: Item, step: Any) -> Any:
    """Position of the first key of a step."""
    place = item.begin + step
    if item.key_tiles is None:
        return place * shape.config.tile_kv
    # In range even past the item's end, where prefetching looks.
    return item.key_tiles[jnp.minimum(place, item.key_tiles.shape[0] - 1)] * shape.config.tile_kv


def oldest_key(shape: TileShape, item: Item) -> Any:
    """The first position that any query of the tile sees."""
    if shape.sliding_window is None:
        return jnp.int32(0)
    return jnp.maximum(item.first_pos - (shape.sliding_window - 1), 0)


def block_ids(shape: TileShape, tables_ref: Any, base: Any, item: Item, step: Any) -> list[Any]:
    """Pool entries of the blocks of one tile of keys.

    What no query sees is replaced by the dummy block: it may belong to others by now, and every step must make
    the same number of copies.
    """
    ids = []
    for part in range(shape.blocks_per_tile):
        first = first_key(shape, item, step) + part * shape.copy_rows
        index = lax.div(first, jnp.int32(shape.block_size))
        seen = (first <= item.last_pos) & (first + shape.copy_rows > oldest_key(shape, item))
        # The table is read in range even past the item's end, where prefetching looks.
        index = jnp.minimum(index, jnp.int32(tables_ref.shape[1] - 1))
        ids.append(base + jnp.where(seen, tables_ref[item.row, index], 0))
    return ids


def first_key_in_block(shape: TileShape, item: Item, step: Any) -> Any:
    """Where in its block a tile of keys begins; blocks may be larger than tiles."""
    if shape.copy_rows == shape.block_size:
        return 0
    return lax.rem(first_key(shape, item, step), jnp.int32(shape.block_size))


def has_unseen_keys(shape: TileShape, item: Item, step: Any) -> Any:
    """Whether a tile holds keys that no query sees, whose values may be anything, NaN included."""
    first = first_key(shape, item, step)
    unseen = first + (shape.config.tile_kv - 1) > item.last_pos
    if shape.sliding_window is not None:
        unseen = unseen | (first < oldest_key(shape, item))
    return unseen


def clear_unseen(shape: TileShape, item: Item, step: Any, values: Any, layout: Any) -> None:
    """Sets the values ``[tile_kv, D]`` of unseen keys to zero: a weight of zero times NaN would be NaN."""
    first = first_key(shape, item, step)
    width = math.gcd(shape.head_dim, _CLEARED_COLUMNS)
    at = first + plgpu.broadcasted_iota(jnp.int32, (shape.config.tile_kv, width), 0, layout=layout)
    seen = at <= item.last_pos
    if shape.sliding_window is not None:
        seen = seen & (at >= oldest_key(shape, item))
    for column in range(0, shape.head_dim, width):
        part = values.at[:, pl.ds(column, width)]
        held = plgpu.load(part, layout=layout, optimized=False)
        part[...] = jnp.where(seen, held, jnp.zeros_like(held))


def clear_unseen_rows(shape: TileShape, item: Item, step: Any, values: Any) -> None:
    """``clear_unseen`` a few rows at a time: for a warpgroup that has few registers."""
    rows, width = 16, math.gcd(shape.head_dim, _CLEARED_COLUMNS)
    layout = plgpu.Layout.MMA_ACC(values.dtype, m_warps=1)

    @pl.loop(0, shape.config.tile_kv // rows)
    def _(i: Any) -> None:
        first = first_key(shape, item, step) + i * rows
        at = first + plgpu.broadcasted_iota(jnp.int32, (rows, width), 0, layout=layout)
        seen = at <= item.last_pos
        if shape.sliding_window is not None:
            seen = seen & (at >= oldest_key(shape, item))
        for column in range(0, shape.head_dim, width):
            part = values.at[pl.ds(i * rows, rows), pl.ds(column, width)]
            held = plgpu.load(part, layout=layout, optimized=False)
            part[...] = jnp.where(seen, held, jnp.zeros_like(held))


def operands_of(shape: TileShape, item: Item, kv_head: Any, refs: Any, layout: Any) -> LoadedOperands:
    """What the variant's functions need of arrays, for one item."""
    extent = (shape.tile_m, shape.config.tile_kv)
    return LoadedOperands(shape.mods.axes, refs, item.tile, kv_head, extent, layout)


def modify(
    shape: TileShape,
    item: Item,
    step: Any,
    kv_head: Any,
    scores: jax.Array,
    loaded: Sequence[jax.Array],
    layout: Any,
) -> tuple[jax.Array, jax.Array]:
    """Raw products ``[M, tile_kv]`` to base-2 scores, and which keys each row sees."""
    extent = scores.shape
    kv_pos = first_key(shape, item, step) + plgpu.broadcasted_iota(jnp.int32, extent, 1, layout=layout)
    q_pos = item.first_pos
    if shape.tile_q > 1:
        token = lax.div(plgpu.broadcasted_iota(jnp.int32, extent, 0, layout=layout), jnp.int32(shape.group))
        q_pos = jnp.minimum(item.first_pos + token, item.last_pos)
    visible = kv_pos <= q_pos
    if shape.sliding_window is not None:
        visible = visible & (kv_pos > q_pos - shape.sliding_window)
    cap = shape.logit_soft_cap
    if cap is not None:
        scores = cap * accurate_tanh(scores * (shape.scale / cap))
    if not shape.mods:
        return scores * (LOG2E if cap is not None else shape.scale * LOG2E), visible
    if cap is None:
        scores = scores * shape.scale
    member = lax.rem(plgpu.broadcasted_iota(jnp.int32, extent, 0, layout=layout), jnp.int32(shape.group))
    fill = lambda x: plgpu.layout_cast(jnp.broadcast_to(x, extent), layout)  # noqa: E731
    where = (
        fill(item.row),
        kv_head * shape.group + member,
        fill(q_pos) if shape.tile_q == 1 else q_pos,
        kv_pos,
    )
    if shape.mods.score_mod is not None:
        count = len(shape.mods.score_mod.hoisted)
        scores = shape.mods.score_mod.inline(loaded[:count], scores, *where)
        loaded = loaded[count:]
    if shape.mods.mask_mod is not None:
        visible = visible & shape.mods.mask_mod.inline(loaded, None, *where)
    return scores * LOG2E, visible


def softmax_weights(
    scores: jax.Array, visible: jax.Array, top: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of the online softmax (arXiv:1805.02867): weights, decay of what came before, new maximum."""
    scores = jnp.where(visible, scores, MASKED)
    new_top = jnp.maximum(top, scores.max(axis=1))
    # Where no key was visible so far, MASKED minus half of it: a weight of zero, where MASKED minus itself gave one.
    subtracted = jnp.maximum(new_top, MASKED / 2)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(subtracted, scores.shape, [0]))
    return weights, jnp.exp2(top - new_top), new_top


def normalised(acc: jax.Array, top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output of an item and the base-2 logarithm of its weights' sum; zero and ``MASKED`` where it saw no key."""
    safe = jnp.where(total == 0.0, 1.0, total)
    out = acc / lax.broadcast_in_dim(safe, acc.shape, [0])
    return out, jnp.where(total == 0.0, MASKED, top + jnp.log2(safe))

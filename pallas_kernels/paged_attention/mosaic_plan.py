"""Which thread block attends what: a ragged batch cut into query tiles, and their keys into balanced splits.

A *tile* is up to ``tile_q`` consecutive query tokens of one row: with the query heads of a kv head they fill the
M rows of one matrix product. An *item* is a tile and a range of its keys; one thread block takes one item and
one kv head. Rows of very different length give items of nearly equal length: with ``n`` tiles of keys to read in
all and room for ``extra`` more items than tiles, a row is cut into pieces of about ``n / extra`` (FlashDecoding,
https://pytorch.org/blog/flash-decoding, over a work list as in FlashInfer, arXiv:2501.01005, which makes its
list on the host). Here the list is made on the device, from a few small integer arrays, so that the shapes of a
bucket are all that the host must know.

All of it depends on the batch, the window and the tile sizes, not on the layer: XLA computes it once a step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpaged.pallas_kernels.batch import AttentionBatch
from jaxpaged.pallas_kernels.paged_attention.mosaic_visible import QueryTiles, visible_key_tiles
from jaxpaged.pallas_kernels.variant import MaskMod

# Columns of ``WorkPlan.items``.
ROW, TILE, FIRST_POS, LAST_POS, BEGIN, END, TOKEN, PART, LAST_KEY, NUM_ITEM_FIELDS = range(10)

# Keys of one split when results must not depend on the batch. Smaller: a long row spreads over more of the chip;
# larger: less memory for partial results (one float32 accumulator for each split that a table has room for).
DETERMINISTIC_SPLIT = 2048


class WorkPlan(NamedTuple):
    """The work list of one launch. ``P`` tiles and ``W`` items are bounds; what is past the real ones is empty."""

    items: jax.Array
    """int32 ``[W, 9]``: row, tile, position of the tile's first and last token, first tile of keys, end, the tile's
    first token, the place among partial results (-1: it is all of its tile), position of the row's last key."""
    num_items: jax.Array
    """int32 ``[1]``, real items; they come first."""
    item_starts: jax.Array
    """int32 ``[P]``, the tile's first item."""
    item_counts: jax.Array
    """int32 ``[P]``, how many items a tile has; 0 for padding."""
    split_tiles: jax.Array
    """int32 ``[split_budget // 2, 4]``: of each tile of several items its first partial result, their number (0:
    there is no such tile), its first token and how many tokens it has."""
    tile_rows: jax.Array
    """int32 ``[P]``, row of the batch."""
    tile_first_pos: jax.Array
    """int32 ``[P]``, position of the tile's first token in its sequence."""
    tile_tokens: jax.Array
    """int32 ``[P, tile_q]``, index of each token; a token of the tile's own where it has fewer."""
    token_tiles: jax.Array
    """int32 ``[T]``, the tile of each token; 0 for padding."""
    token_slots: jax.Array
    """int32 ``[T]``, its place in the tile."""
    key_tiles: jax.Array | None = None
    """int32 ``[P, K]``, with a ``mask_mod``: the tiles of keys that a query of the tile sees, and then others. Items
    begin and end at places in this list; without one, at tiles of keys."""


def max_tiles(num_tokens: int, num_rows: int, tile_q: int) -> int:
    """How many query tiles a bucket can have."""
    return min(num_tokens, num_rows + num_tokens // tile_q)


class _Tiles(NamedTuple):
    """Query tiles, ``P`` at most: the queries' half of a plan. Rows may be one more than the batch has, for padding."""

    row: jax.Array  # int32 [P]
    first_pos: jax.Array  # int32 [P]; negative for padding tokens
    last_pos: jax.Array  # int32 [P]
    last_key: jax.Array  # int32 [P], position of the row's last key
    token: jax.Array  # int32 [P], index of the first token
    size: jax.Array  # int32 [P], tokens; 0 past the last tile
    first_of_row: jax.Array  # int32 [rows]

    @property
    def real(self) -> jax.Array:
        """bool ``[P]``."""
        return self.size > 0


def make_plan(
    batch: AttentionBatch,
    *,
    tile_q: int,
    tile_kv: int,
    sliding_window: int | None,
    split_budget: int,
    deterministic: bool,
    max_len: int,
    in_place: bool = False,
    mask_mod: MaskMod | None = None,
    num_heads: int = 1,
) -> WorkPlan:
    """Cuts a batch into tiles and items.

    Args:
      batch: see ``AttentionBatch``.
      tile_q: query tokens of a tile.
      tile_kv: keys of one step of the inner loop, the unit of a split.
      sliding_window: as in ``AttentionVariant``; keys before it belong to no item.
      split_budget: how many more items than tiles there may be.
      deterministic: cut at multiples of ``DETERMINISTIC_SPLIT`` keys, whatever else is in the batch.
      max_len: tokens a block table has room for.
      in_place: for a kernel that writes results where their tokens are. Padding tokens get tiles too, of items without
        keys. The items come in the order of how many keys they have to read: what is begun last is then short, and the
        multiprocessors end together (Graham 1969, the rule of the longest processing time).
      mask_mod: as in ``AttentionVariant``: tiles of keys that it hides from all queries of a tile belong to no item.
        Not with ``deterministic``, where pieces may not depend on what else is in the tile.
      num_heads: Hq, for ``mask_mod``.

    Returns:
      The plan; ``W`` is ``P + split_budget``, or ``P`` times the splits of a full table if deterministic.
    """
    tiles = _cut_queries(batch, tile_q, in_place)
    begin, end = _seen_by_position(tiles, tile_kv, sliding_window)
    key_tiles = None
    if mask_mod is not None and not deterministic:
        queries = QueryTiles(tiles.row, tiles.first_pos, tiles.size, begin, jnp.where(tiles.real, end, begin))
        key_tiles, end = visible_key_tiles(
            mask_mod, queries, tile_q=tile_q, tile_kv=tile_kv, num_heads=num_heads, max_len=max_len
        )
        begin = jnp.zeros_like(begin)
    cuts, num_items = _Cuts(begin, end, tiles.real), len(begin) + split_budget
    if deterministic:
        num_items = len(begin) * max(1, -(-max_len // DETERMINISTIC_SPLIT))
        cuts.cut_at_multiples(max(1, DETERMINISTIC_SPLIT // tile_kv))
    else:
        cuts.cut_evenly(split_budget)
    items, is_split, first_part = _items(tiles, cuts, num_items)
    if in_place:
        items = _longest_first(items, cuts.counts.sum())
    member = jnp.arange(tile_q, dtype=jnp.int32)[None, :]
    place = jnp.arange(len(batch.rows), dtype=jnp.int32) - batch.query_start_loc[batch.rows]
    is_token = jnp.arange(len(batch.rows)) < batch.query_start_loc[-1]
    return WorkPlan(
        items=items,
        num_items=cuts.counts.sum(dtype=jnp.int32)[None],
        item_starts=_exclusive_sum(cuts.counts),
        item_counts=cuts.counts,
        split_tiles=_split_tiles(
            is_split, [first_part, cuts.counts, tiles.token, tiles.size], split_budget // 2
        ),
        tile_rows=tiles.row,
        tile_first_pos=tiles.first_pos,
        tile_tokens=tiles.token[:, None] + jnp.minimum(member, jnp.maximum(tiles.size, 1)[:, None] - 1),
        token_tiles=jnp.where(is_token, tiles.first_of_row[batch.rows] + place // tile_q, 0),
        token_slots=jnp.where(is_token, place % tile_q, 0),
        key_tiles=key_tiles,
    )


def _cut_queries(batch: AttentionBatch, tile_q: int, in_place: bool) -> _Tiles:
    num_tokens, num_rows = len(batch.positions), len(batch.seq_lens)
    starts, query_lens, seq_lens = batch.query_start_loc[:-1], jnp.diff(batch.query_start_loc), batch.seq_lens
    if in_place:  # padding as one more row, with nothing in the cache
        num_real = batch.query_start_loc[-1:]
        starts = jnp.concatenate([starts, num_real])
        query_lens = jnp.concatenate([query_lens, num_tokens - num_real])
        seq_lens = jnp.pad(seq_lens, (0, 1))
    tiles_of_row = -(-query_lens // tile_q)
    first_of_row = _exclusive_sum(tiles_of_row)
    index = jnp.arange(max_tiles(num_tokens, len(seq_lens), tile_q), dtype=jnp.int32)
    row = _owner(index, first_of_row, tiles_of_row)
    real = index < tiles_of_row.sum()
    offset = (index - first_of_row[row]) * tile_q
    size = jnp.where(real, jnp.minimum(query_lens[row] - offset, tile_q), 0)
    first_pos = jnp.where(real, seq_lens[row] - query_lens[row] + offset, 0)
    return _Tiles(
        row=jnp.minimum(row, num_rows - 1),  # what padding reads of a table is not used
        first_pos=first_pos,
        last_pos=first_pos + jnp.maximum(size, 1) - 1,
        last_key=seq_lens[row] - 1,
        token=jnp.where(real, starts[row] + offset, 0),
        size=size,
        first_of_row=first_of_row,
    )


def _seen_by_position(tiles: _Tiles, tile_kv: int, sliding_window: int | None) -> tuple[jax.Array, jax.Array]:
    """The first tile of keys that is neither before the window nor after the queries, and the one after the last."""
    begin = jnp.zeros_like(tiles.first_pos)
    if sliding_window is not None:
        begin = jnp.maximum(tiles.first_pos - sliding_window + 1, 0) // tile_kv
    return begin, jnp.maximum(tiles.last_pos // tile_kv + 1, begin)


def _items(tiles: _Tiles, cuts: "_Cuts", num_items: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``WorkPlan.items`` in the order of tiles, which tiles have several, and the first partial result of these."""
    item_starts = _exclusive_sum(cuts.counts)
    item = jnp.arange(num_items, dtype=jnp.int32)
    tile = _owner(item, item_starts, cuts.counts)
    begin, end = cuts.piece(tile, item - item_starts[tile])
    is_split = cuts.counts > 1
    first_part = _exclusive_sum(jnp.where(is_split, cuts.counts, 0))
    fields = {
        ROW: tiles.row[tile],
        TILE: tile,
        FIRST_POS: tiles.first_pos[tile],
        LAST_POS: tiles.last_pos[tile],
        BEGIN: begin,
        END: jnp.where(item < cuts.counts.sum(), end, begin),
        TOKEN: tiles.token[tile],
        PART: jnp.where(is_split[tile], first_part[tile] + item - item_starts[tile], -1),
        LAST_KEY: tiles.last_key[tile],
    }
    columns = [fields[column] for column in range(NUM_ITEM_FIELDS)]
    return jnp.stack(columns, axis=1).astype(jnp.int32), is_split, first_part


def _split_tiles(is_split: jax.Array, columns: list[jax.Array], bound: int) -> jax.Array:
    """``columns`` of the tiles that are split, ``[bound, len(columns)]``; zeros past the last."""
    place = jnp.where(is_split, _exclusive_sum(is_split.astype(jnp.int32)), bound)
    lines = jnp.stack(columns, axis=1).astype(jnp.int32)
    return jnp.zeros((bound, len(columns)), jnp.int32).at[place].set(lines, mode="drop")


def _longest_first(items: jax.Array, num_items: jax.Array) -> jax.Array:
    """Items in the order of how many keys they have; those past ``num_items`` stay behind."""
    length = items[:, END] - items[:, BEGIN]
    return items[_descending(jnp.where(jnp.arange(len(items)) < num_items, length, -1))]


def _descending(keys: jax.Array) -> jax.Array:
    """Indices that sort ``keys``, the largest first, equal ones in their order; as ``_exclusive_sum``, no scan."""
    index = jnp.arange(keys.shape[0], dtype=jnp.int32)
    before = (keys[None, :] > keys[:, None]) | (
        (keys[None, :] == keys[:, None]) & (index[None, :] < index[:, None])
    )
    return jnp.zeros_like(index).at[before.sum(1, dtype=jnp.int32)].set(index)


class _Cuts:
    """How the keys of each tile, ``begin`` to ``end`` in tiles of keys, are cut into pieces, none of them empty."""

    def __init__(self, begin: jax.Array, end: jax.Array, real: jax.Array) -> None:
        self.begin, self.end, self.real = begin, end, real
        self.origin = self.size = self.counts = begin

    def cut_at_multiples(self, size: int) -> None:
        """At the same positions whatever the window's place and the batch."""
        self.size = jnp.full_like(self.begin, size)
        self.origin = self.begin // size * size
        self._count()

    def cut_evenly(self, budget: int) -> None:
        """Into pieces of a ``budget``-th of all keys or somewhat more: at most ``budget`` more than tiles."""
        length = jnp.where(self.real, self.end - self.begin, 0)
        share = jnp.maximum(-(-length.sum() // max(budget, 1)), 1)
        pieces = jnp.maximum(length // share, 1) if budget else jnp.ones_like(length)
        self.size = jnp.maximum(-(-length // pieces), 1)
        self.origin = self.begin
        self._count()

    def _count(self) -> None:
        counts = jnp.where(self.real, jnp.maximum(-(-(self.end - self.origin) // self.size), 1), 0)
        self.counts = counts.astype(jnp.int32)

    def piece(self, tile: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where piece ``part`` of a tile begins and ends."""
        first = self.origin[tile] + part * self.size[tile]
        return jnp.maximum(first, self.begin[tile]), jnp.minimum(first + self.size[tile], self.end[tile])


def _exclusive_sum(counts: jax.Array) -> jax.Array:
    """Sum of what comes before each entry: one fused comparison and sum, where a scan is several launches."""
    index = jnp.arange(counts.shape[0])
    return jnp.where(index[None, :] < index[:, None], counts[None, :], 0).sum(1, dtype=jnp.int32)


def _owner(index: jax.Array, starts: jax.Array, counts: jax.Array) -> jax.Array:
    """For each of ``index``, which of the consecutive runs it falls in; the last run for what is past all."""
    ends = starts + counts
    owner = (index[:, None] >= ends[None, :]).sum(1, dtype=jnp.int32)
    return jnp.minimum(owner, counts.shape[0] - 1)

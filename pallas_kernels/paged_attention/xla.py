"""Paged attention in plain JAX, for any device: a tiled online softmax whose loops follow the real tokens.

The queries of a row are cut into tiles. Tiles are sorted by how many keys they see and taken ``group`` at a
time; an inner loop walks the keys in chunks of whole blocks up to the longest of the group, so both trip
counts come from the real tokens of the step and none from the padded table. Rows with one query token and
rows with many get lists of their own, else a decode row would pay for a whole prefill tile.

Deterministic: one list, its tiles begin at multiples of ``DETERMINISTIC_TILE_Q`` positions and groups have one size.
A query then has the same place in a matrix product of the same shape in every batch, and chunks of keys that are
there for others of its group change nothing: they are masked, which adds zeros and multiplies by one.

Online softmax: Milakov and Gimelshein 2018 (arXiv:1805.02867); tiling: FlashAttention (arXiv:2205.14135).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpaged.pallas_kernels.batch import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.paged_attention.blocks import read_blocks
from jaxpaged.pallas_kernels.variant import MASKED, AttentionVariant, modify_scores

PREFILL_TILE_Q = 32
DETERMINISTIC_TILE_Q = 8
GROUP = 8
TILE_KV = 128


class _Tiles(NamedTuple):
    """Query tiles, longest first; entries past ``num_tiles`` are padding."""

    row: jax.Array  # int32 [P]
    first: jax.Array  # int32 [P], index of the first query token
    size: jax.Array  # int32 [P], query tokens of the tile, 0 for padding
    lead: jax.Array  # int32 [P], unused places of the tile before them
    num_tiles: jax.Array  # int32 []


def _make_tiles(
    batch: AttentionBatch, tile_q: int, mine: jax.Array, max_tiles: int, *, aligned: bool = False
) -> _Tiles:
    """Cuts the rows where ``mine`` holds into tiles of at most ``tile_q`` query tokens.

    Tiles begin at a row's first query token, or at multiples of ``tile_q`` positions if ``aligned``.
    """
    starts, query_lens = batch.query_start_loc[:-1], jnp.diff(batch.query_start_loc)
    lead = batch.positions[jnp.minimum(starts, len(batch.positions) - 1)] % tile_q if aligned else 0
    lead = jnp.broadcast_to(jnp.int32(lead), starts.shape)
    tiles_of_row = jnp.where(mine, -(-(lead + query_lens) // tile_q), 0)
    ends = jnp.cumsum(tiles_of_row)
    index = jnp.arange(max_tiles, dtype=jnp.int32)
    row = jnp.clip(jnp.searchsorted(ends, index, side="right"), 0, len(starts) - 1).astype(jnp.int32)
    # Of the tile's first place, and of its first token, from the row's first token on.
    place = (index - (ends[row] - tiles_of_row[row])) * tile_q - lead[row]
    offset = jnp.maximum(place, 0)
    size = jnp.where(index < ends[-1], jnp.clip(jnp.minimum(query_lens[row], place + tile_q) - offset, 0), 0)
    first = jnp.where(size > 0, starts[row] + offset, 0)
    last_pos = batch.positions[jnp.maximum(first + size - 1, 0)]
    order = jnp.argsort(jnp.where(size > 0, -last_pos, 1))
    return _Tiles(row[order], first[order], size[order], (offset - place)[order], ends[-1])


def paged_attention_xla(
    q: jax.Array,
    kv_pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    variant: AttentionVariant,
    *,
    deterministic: bool = False,
) -> jax.Array:
    """Tiled paged attention; arguments as in ``paged_attention``."""
    num_tokens = q.shape[0]
    num_rows = batch.seq_lens.shape[0]
    out = jnp.zeros(q.shape, q.dtype)
    query_lens = jnp.diff(batch.query_start_loc)
    if deterministic:
        tile_q = DETERMINISTIC_TILE_Q
        # A row's first and last tile may hold a single token each.
        max_tiles = -(-min(num_tokens, num_tokens // tile_q + 2 * num_rows) // GROUP) * GROUP
        aligned = _make_tiles(batch, tile_q, query_lens > 0, max_tiles, aligned=True)
        return _attend_tiles(out, q, kv_pool, layer, batch, variant, aligned, tile_q)
    single = _make_tiles(batch, 1, query_lens == 1, num_rows)
    out = _attend_tiles(out, q, kv_pool, layer, batch, variant, single, 1)
    if num_tokens > 1:
        tile_q = min(PREFILL_TILE_Q, num_tokens)
        many = _make_tiles(batch, tile_q, query_lens > 1, num_rows + -(-num_tokens // tile_q))
        out = _attend_tiles(out, q, kv_pool, layer, batch, variant, many, tile_q)
    return out


def _attend_tiles(
    out: jax.Array,
    q: jax.Array,
    kv_pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    variant: AttentionVariant,
    tiles: _Tiles,
    tile_q: int,
) -> jax.Array:
    num_tokens = q.shape[0]
    max_tiles = tiles.row.shape[0]
    group = min(GROUP, max_tiles)
    pad = -max_tiles % group
    padded = tuple(jnp.pad(x, (0, pad)) for x in tiles[:4])

    def one_group(i: jax.Array, out: jax.Array) -> jax.Array:
        row_, first_, size_, lead_ = (lax.dynamic_slice(x, (i * group,), (group,)) for x in padded)
        member = jnp.arange(tile_q, dtype=jnp.int32)[None, :] - lead_[:, None]
        real = (member >= 0) & (member < size_[:, None])
        token = jnp.where(real, first_[:, None] + member, 0)
        q_pos = jnp.where(real, batch.positions[token], -1)
        tile_out = _attend_group(q[token], q_pos, row_, kv_pool, layer, batch, variant)
        # Padding goes past the end, where mode="drop" loses it.
        return out.at[jnp.where(real, token, num_tokens)].set(tile_out.astype(out.dtype), mode="drop")

    return lax.fori_loop(0, -(-tiles.num_tiles // group), one_group, out)


def _attend_group(
    q: jax.Array,
    q_pos: jax.Array,
    row: jax.Array,
    kv_pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    variant: AttentionVariant,
) -> jax.Array:
    """Online softmax of a group of tiles: q ``[P, Q, Hq, D]``, q_pos ``[P, Q]`` (-1: padding), row ``[P]``."""
    num_tiles, tile_q, num_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_pool.k.shape[1:3]
    heads_per_kv = num_heads // num_kv_heads
    chunk_blocks = max(1, min(TILE_KV // block_size, batch.block_tables.shape[1]))
    chunk = chunk_blocks * block_size
    # [P, Hkv, G, Q, D]
    q = q.reshape(num_tiles, tile_q, num_kv_heads, heads_per_kv, head_dim).transpose(0, 2, 3, 1, 4)
    tables = jnp.pad(batch.block_tables, ((0, 0), (0, -batch.block_tables.shape[1] % chunk_blocks)))[row]
    shape = (num_tiles, num_kv_heads, heads_per_kv, tile_q)
    head = jnp.arange(num_heads, dtype=jnp.int32).reshape(1, num_kv_heads, heads_per_kv, 1, 1)
    q_at, row_at = q_pos.reshape(num_tiles, 1, 1, tile_q, 1), row.reshape(num_tiles, 1, 1, 1, 1)
    # The first position that a tile's queries see, but for mask_mod; past every position for padding.
    oldest = jnp.zeros(num_tiles, jnp.int32)
    if variant.sliding_window is not None:
        first_query = jnp.where(q_pos < 0, jnp.iinfo(jnp.int32).max, q_pos).min(1)
        oldest = jnp.maximum(first_query - variant.sliding_window + 1, 0)

    def one_chunk(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        ids = lax.dynamic_slice(tables, (0, j * chunk_blocks), (num_tiles, chunk_blocks))
        k, v = read_blocks(kv_pool, ids + layer * kv_pool.num_blocks)  # [P, C, Hkv, S, D]
        kv_pos = (j * chunk + jnp.arange(chunk, dtype=jnp.int32)).reshape(1, 1, 1, 1, chunk)
        scores = jnp.einsum("phgqd,pchsd->phgqcs", q, k, preferred_element_type=jnp.float32)
        scores = scores.reshape(*shape, chunk) * variant.scale_for(head_dim)
        scores, visible = modify_scores(variant, scores, row_at, head, q_at, kv_pos)
        visible = jnp.broadcast_to(visible, scores.shape)
        scores = jnp.where(visible, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
        decay = jnp.exp(top - new_top)
        # Slots past the end of a sequence or before the window may hold anything; zero times NaN would be NaN.
        at = kv_pos.reshape(1, chunk)
        held = (at >= oldest[:, None]) & (at <= q_pos.max(1)[:, None])
        v = jnp.where(held.reshape(num_tiles, chunk_blocks, 1, block_size, 1), v, jnp.zeros((), v.dtype))
        weights_cs = weights.reshape(*shape, chunk_blocks, block_size).astype(v.dtype)
        update = jnp.einsum("phgqcs,pchsd->phgqd", weights_cs, v, preferred_element_type=jnp.float32)
        return new_top, total * decay + weights.sum(-1), acc * decay[..., None] + update

    if variant.sinks is None:
        top, total = jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        sinks = variant.sinks.astype(jnp.float32).reshape(1, num_kv_heads, heads_per_kv, 1)
        top, total = jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)
    first_chunk = oldest.min() // chunk
    last_chunk = q_pos.max() // chunk + 1
    init = (top, total, jnp.zeros((*shape, head_dim), jnp.float32))
    _, total, acc = lax.fori_loop(first_chunk, last_chunk, one_chunk, init)
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    return out.transpose(0, 3, 1, 2, 4).reshape(num_tiles, tile_q, num_heads, head_dim)

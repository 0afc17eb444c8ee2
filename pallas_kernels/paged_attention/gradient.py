"""The gradient of paged attention in plain JAX, for any device and for the forward pass of any implementation.

Loop nest: tiles of up to ``TILE_Q`` query tokens of one row; in each, the chunks of keys for the log-sum-exp, which
no implementation returns, then the chunks again for the gradients: the backward pass of FlashAttention
(arXiv:2205.14135, arXiv:2307.08691) over block tables. Trip counts come from the real tokens of the step, a chunk is
``TILE_KV`` keys or one block, and nothing of the size of tokens times keys exists. A row with one query token costs
as much arithmetic as a whole tile. With ``s`` the raw scores, ``S`` the modified ones and ``P`` the weights::

    dV = P^T dO      dS = P * (dO V^T - rowsum(dO * O))      ds = dS * dS/ds      dQ = ds K      dK = ds^T Q

``dS/ds`` and the gradients of a variant's arrays are JAX's derivative of ``modify_scores``, and so right for any
``score_mod``. Only keys of the step's own tokens have gradients: cached ones are constants. A row's own keys belong to
nobody else, and a tile adds to each of them once: the order of additions is the same on every device.

Numerics: float32 inside.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpaged.pallas_kernels.batch import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.paged_attention.blocks import read_blocks
from jaxpaged.pallas_kernels.variant import MASKED, AttentionVariant, VariantSpec, modify_scores

TILE_Q = 64
TILE_KV = 128


class Gradients(NamedTuple):
    """Float32, and zero for padding tokens.

    q ``[T, Hq, D]``; k and v ``[T, Hkv, D]``, None if not asked for; operands as ``AttentionVariant.split`` gives
    them, None where not asked for.
    """

    q: jax.Array
    k: jax.Array | None
    v: jax.Array | None
    operands: tuple[jax.Array | None, ...]


class Problem(NamedTuple):
    """What the forward pass saw, and the cotangent of what came out.

    q, out, out_gradient: ``[T, Hq, D]``. kv_pool: with the keys of the step in it. spec, operands: the variant.
    """

    q: jax.Array
    out: jax.Array
    out_gradient: jax.Array
    kv_pool: KVPool
    layer: int
    batch: AttentionBatch
    spec: VariantSpec
    operands: tuple[jax.Array, ...]

    @property
    def chunk_blocks(self) -> int:
        """Blocks of a chunk of keys."""
        return max(1, min(TILE_KV // self.kv_pool.block_size, self.batch.block_tables.shape[1]))

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return self.variant().scale_for(self.q.shape[2])

    def variant(self, others: tuple[jax.Array | None, ...] = ()) -> AttentionVariant:
        """The variant; over those of these arrays that are not None."""
        if not others:
            return self.spec.bind(self.operands)
        pairs = zip(self.operands, others, strict=True)
        return self.spec.bind(tuple(own if other is None else other for own, other in pairs))


class _Tile(NamedTuple):
    """Query tokens of one row; places past its end hold zeros."""

    row: jax.Array  # int32 []
    token: jax.Array  # int32 [Q], T and more for places past the end
    q_pos: jax.Array  # int32 [Q], there the last token's
    q: jax.Array  # [Hkv, G, Q, D]
    out_gradient: jax.Array  # [Hkv, G, Q, D]
    delta: jax.Array  # [Hkv, G, Q], rowsum(dO * O)
    real: jax.Array  # bool [Q]


class _Chunk(NamedTuple):
    """Keys of one row; those that no query of the tile may see are zeros."""

    k: jax.Array  # [Hkv, C, D]
    v: jax.Array
    kv_pos: jax.Array  # int32 [C]


def attention_gradient(problem: Problem, *, own_keys: bool, wanted: tuple[bool, ...]) -> Gradients:
    """Gradients of paged attention.

    Args:
      problem: see ``Problem``.
      own_keys: whether to compute those of the step's own keys and values.
      wanted: for each of the variant's arrays, whether to compute its gradient; it is floating point then.
    """
    num_tokens, _, head_dim = problem.q.shape
    num_kv_heads = problem.kv_pool.k.shape[1]
    starts = problem.batch.query_start_loc
    tile_q = min(TILE_Q, num_tokens)
    tiles_of_row = -(-jnp.diff(starts) // tile_q)
    ends = jnp.cumsum(tiles_of_row)

    def one_tile(index: jax.Array, found: Gradients) -> Gradients:
        row = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
        first = starts[row] + (index - ends[row] + tiles_of_row[row]) * tile_q
        return _add_tile(problem, _take_tile(problem, row, first, tile_q), found)

    own = jnp.zeros((num_tokens, num_kv_heads, head_dim), jnp.float32) if own_keys else None
    operands = tuple(
        jnp.zeros(array.shape, jnp.float32) if asked else None
        for array, asked in zip(problem.operands, wanted, strict=True)
    )
    zeros = Gradients(jnp.zeros(problem.q.shape, jnp.float32), own, own, operands)
    return lax.fori_loop(0, ends[-1], one_tile, zeros)


def _take_tile(problem: Problem, row: jax.Array, first: jax.Array, tile_q: int) -> _Tile:
    """The query tokens of a row from token ``first`` on."""
    num_tokens, num_heads, head_dim = problem.q.shape
    num_kv_heads = problem.kv_pool.k.shape[1]
    end = problem.batch.query_start_loc[row + 1]
    place = jnp.arange(tile_q, dtype=jnp.int32)
    real = first + place < end
    token = jnp.minimum(first + place, end - 1)

    def heads_first(x: jax.Array) -> jax.Array:
        taken = jnp.where(real[:, None, None], x[token].astype(jnp.float32), 0.0)
        return taken.reshape(tile_q, num_kv_heads, num_heads // num_kv_heads, head_dim).transpose(1, 2, 0, 3)

    q, out, out_gradient = (heads_first(x) for x in (problem.q, problem.out, problem.out_gradient))
    # Past the end, where mode="drop" loses it, and no index twice.
    target = jnp.where(real, token, num_tokens + place)
    positions = problem.batch.positions[token]
    return _Tile(row, target, positions, q, out_gradient, (out_gradient * out).sum(-1), real)


def _take_chunk(problem: Problem, tile: _Tile, index: jax.Array) -> _Chunk:
    """Chunk ``index`` of the keys of the tile's row."""
    pool, tables, blocks = problem.kv_pool, problem.batch.block_tables, problem.chunk_blocks
    entry = jnp.minimum(index * blocks + jnp.arange(blocks, dtype=jnp.int32), tables.shape[1] - 1)
    size = blocks * pool.block_size
    kv_pos = index * size + jnp.arange(size, dtype=jnp.int32)
    # Slots past the end of a sequence or before the window may hold anything; zero times NaN would be NaN.
    held = (kv_pos >= _oldest(problem, tile)) & (kv_pos <= tile.q_pos.max())

    def heads_first(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32).transpose(1, 0, 2, 3).reshape(x.shape[1], size, x.shape[3])
        return jnp.where(held[None, :, None], x, 0.0)

    k, v = read_blocks(pool, tables[tile.row, entry] + problem.layer * pool.num_blocks)
    return _Chunk(heads_first(k), heads_first(v), kv_pos)


def _oldest(problem: Problem, tile: _Tile) -> jax.Array:
    """The first position that a query of the tile may see."""
    window = problem.spec.sliding_window
    return jnp.int32(0) if window is None else jnp.maximum(tile.q_pos.min() - window + 1, 0)


def _add_tile(problem: Problem, tile: _Tile, found: Gradients) -> Gradients:
    """``found`` and what a tile of queries adds."""
    size = problem.chunk_blocks * problem.kv_pool.block_size
    begin, end = _oldest(problem, tile) // size, tile.q_pos.max() // size + 1
    log_total = _log_sum_exp(problem, tile, begin, end)
    operands = _add_sinks(problem, tile, log_total, found.operands)

    def one_chunk(own: bool, index: jax.Array, found: Gradients) -> Gradients:
        return _add_chunk(problem, tile, _take_chunk(problem, tile, index), log_total, found, own=own)

    # Chunks of nothing but cached keys first: they take part in dQ only.
    row = problem.batch.query_start_loc[tile.row], problem.batch.query_start_loc[tile.row + 1]
    cached = problem.batch.seq_lens[tile.row] - (row[1] - row[0])
    first_own = end if found.k is None else jnp.clip(cached // size, begin, end)
    part = Gradients(jnp.zeros(tile.q.shape, jnp.float32), found.k, found.v, operands)
    part = lax.fori_loop(begin, first_own, partial(one_chunk, False), part)
    if found.k is not None:
        part = lax.fori_loop(first_own, end, partial(one_chunk, True), part)

    flat = part.q.transpose(2, 0, 1, 3).reshape(-1, *found.q.shape[1:])
    q = found.q.at[tile.token].set(flat, mode="drop", unique_indices=True)
    return part._replace(q=q)


def _log_sum_exp(problem: Problem, tile: _Tile, begin: jax.Array, end: jax.Array) -> jax.Array:
    """Logarithm of the softmax's denominator, ``[Hkv, G, Q]``; large and negative where nothing is visible."""
    variant, shape = problem.variant(), tile.delta.shape

    def one_chunk(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        top, total = carry
        chunk = _take_chunk(problem, tile, index)
        raw = _raw_scores(problem, tile, chunk)
        scores, visible = _modified(variant, raw, tile, chunk.kv_pos[None, None, None, :])
        scores = jnp.where(visible, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
        return new_top, total * jnp.exp(top - new_top) + weights.sum(-1)

    top, total = jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
    if variant.sinks is not None:
        top = jnp.broadcast_to(variant.sinks.astype(jnp.float32).reshape(*shape[:2], 1), shape)
        total = jnp.ones(shape, jnp.float32)
    top, total = lax.fori_loop(begin, end, one_chunk, (top, total))
    return top + jnp.log(jnp.maximum(total, 1e-30))


def _add_sinks(
    problem: Problem, tile: _Tile, log_total: jax.Array, found: tuple[jax.Array | None, ...]
) -> tuple[jax.Array | None, ...]:
    """A sink is a logit like others, whose value is zero."""
    sinks = problem.variant().sinks
    if sinks is None or found[-1] is None:
        return found
    weights = jnp.exp(sinks.astype(jnp.float32).reshape(*log_total.shape[:2], 1) - log_total)
    return (*found[:-1], found[-1] - (weights * tile.delta).sum(-1).reshape(-1))


def _raw_scores(problem: Problem, tile: _Tile, chunk: _Chunk) -> jax.Array:
    """``[Hkv, G, Q, C]``, scaled."""
    return jnp.einsum("hgqd,hcd->hgqc", tile.q, chunk.k) * problem.scale


def _modified(
    variant: AttentionVariant, raw: jax.Array, tile: _Tile, kv_pos: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Modified scores ``[Hkv, G, Q, C]``, and which of them count; ``kv_pos`` broadcasts to them."""
    num_kv_heads, group, tile_q, _ = raw.shape
    head = jnp.arange(num_kv_heads * group, dtype=jnp.int32).reshape(num_kv_heads, group, 1, 1)
    row, q_pos = tile.row.reshape(1, 1, 1, 1), tile.q_pos.reshape(1, 1, tile_q, 1)
    scores, visible = modify_scores(variant, raw, row, head, q_pos, kv_pos)
    return scores, jnp.broadcast_to(visible & tile.real.reshape(1, 1, tile_q, 1), raw.shape)


def _add_chunk(
    problem: Problem, tile: _Tile, chunk: _Chunk, log_total: jax.Array, found: Gradients, *, own: bool
) -> Gradients:
    """``found``, whose q is the tile's, and what a chunk of keys adds; to those of the keys too if ``own``."""
    raw = _raw_scores(problem, tile, chunk)
    kv_pos = chunk.kv_pos[None, None, None, :]
    _, visible = _modified(problem.variant(), raw, tile, kv_pos)
    if problem.spec.score_mod is not None:
        # A function need not have a derivative where it is masked, and zero times NaN would be NaN: there it is
        # taken at the query's own position.
        kv_pos = jnp.where(visible, kv_pos, tile.q_pos[None, None, :, None])

    def scores_of(raw: jax.Array, operands: tuple[jax.Array | None, ...]) -> jax.Array:
        return _modified(problem.variant(operands), raw, tile, kv_pos)[0]

    pairs = list(zip(problem.operands, found.operands, strict=True))
    scores, derivative = jax.vjp(scores_of, raw, tuple(None if sum_ is None else x for x, sum_ in pairs))
    weights = jnp.where(visible, jnp.exp(scores - log_total[..., None]), 0.0)
    weight_gradient = jnp.einsum("hgqd,hcd->hgqc", tile.out_gradient, chunk.v)
    raw_gradient, operand_gradients = derivative(weights * (weight_gradient - tile.delta[..., None]))
    raw_gradient = jnp.where(visible, raw_gradient, 0.0) * problem.scale
    result = Gradients(
        found.q + jnp.einsum("hgqc,hcd->hgqd", raw_gradient, chunk.k),
        found.k,
        found.v,
        tuple(
            None if sum_ is None else sum_ + more.astype(jnp.float32)
            for sum_, more in zip(found.operands, operand_gradients, strict=True)
        ),
    )
    if not own or found.k is None or found.v is None:
        return result
    target = _tokens_at(problem, tile, chunk)
    dk = jnp.einsum("hgqc,hgqd->chd", raw_gradient, tile.q)
    dv = jnp.einsum("hgqc,hgqd->chd", weights, tile.out_gradient)
    k, v = (
        sum_.at[target].add(more, mode="drop", unique_indices=True)
        for sum_, more in ((found.k, dk), (found.v, dv))
    )
    return result._replace(k=k, v=v)


def _tokens_at(problem: Problem, tile: _Tile, chunk: _Chunk) -> jax.Array:
    """int32 ``[C]``: which token of the step each key belongs to, T and more for those of none."""
    begin, end = problem.batch.query_start_loc[tile.row], problem.batch.query_start_loc[tile.row + 1]
    token = end - problem.batch.seq_lens[tile.row] + chunk.kv_pos
    past = problem.q.shape[0] + jnp.arange(len(chunk.kv_pos), dtype=jnp.int32)
    return jnp.where((token >= begin) & (token < end), token, past)

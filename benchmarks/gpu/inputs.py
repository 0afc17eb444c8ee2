"""Queries, keys and values of a point, in the layout of each participant, without one ever being made of another.

A value is a hash of where it belongs (token, head, dimension), so the same key stands in a paged pool and in a
contiguous array, each of which is written by one fused program: the memory of a point is that of one layout.

The result of a launch is the query of the next. Values are scaled so that it keeps a query's size: the mean of n
values of deviation s, weighted by a softmax over scores of deviation r, has about s**2 * exp(r**2) / n as its square,
which with s**2 = 0.3 * n settles at r = 0.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.points import Point
from jaxpaged.pallas_kernels import AttentionBatch, KVPool

DTYPE = jnp.bfloat16
KEYS, VALUES = 0x1234567, 0x89ABCDE


@partial(jax.jit, static_argnames=("dtype",))
def _hashed(
    token: jax.Array,
    head: jax.Array,
    dim: jax.Array,
    salt: jax.Array,
    scale: jax.Array,
    dtype: jnp.dtype = DTYPE,
) -> jax.Array:
    """Uniform with deviation ``scale``; the four arrays broadcast. Mixing: murmur3's finaliser."""
    x = token.astype(jnp.uint32) * np.uint32(0x9E3779B1) + head.astype(jnp.uint32) * np.uint32(0x85EBCA77)
    x = x + dim.astype(jnp.uint32) * np.uint32(0xC2B2AE3D) + salt
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    x = x ^ (x >> 16)
    unit = (x >> 8).astype(jnp.float32) * np.float32(2.0**-24)
    return ((2.0 * unit - 1.0) * np.float32(3.0**0.5) * scale).astype(dtype)


def _keys_and_values(
    point: Point, token: jax.Array, head: jax.Array, dim: jax.Array, index: int
) -> tuple[jax.Array, jax.Array]:
    """Both sides of set ``index``, over token, head and dimension that broadcast to the layout."""
    scales = (1.0, (0.3 * min(point.lengths)) ** 0.5)
    salts = ((side + 0x51ED270B * index) % 2**32 for side in (KEYS, VALUES))
    k, v = (
        _hashed(token, head, dim, jnp.uint32(salt), jnp.float32(scale))
        for salt, scale in zip(salts, scales, strict=True)
    )
    return k, v


def queries(point: Point) -> jax.Array:
    """``[B, Hq, D]``."""
    shape = (point.batch, point.num_heads, point.head_dim)
    return (0.7 * jax.random.normal(jax.random.key(1), shape)).astype(DTYPE)


class Blocks:
    """Where the tokens of a point lie in a pool: rows take their blocks in random order."""

    def __init__(self, point: Point, *, dummy: bool) -> None:
        """``dummy``: whether block 0 belongs to nobody, as in the engine's pool."""
        counts = [-(-length // point.block_size) for length in point.lengths]
        self.num_blocks = sum(counts) + dummy
        ids = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32) + dummy
        self.tables = np.zeros((point.batch, max(counts)), np.int32)
        # Tokens are numbered row by row, each row as long as the longest: as in a contiguous array.
        self.first_tokens = np.zeros(self.num_blocks, np.uint32)
        used = 0
        for row, count in enumerate(counts):
            own = ids[used : used + count]
            used += count
            self.tables[row, :count] = own
            self.first_tokens[own] = row * point.context + point.block_size * np.arange(count)


def paged_sets(point: Point, num_sets: int, *, dummy: bool = True) -> tuple[list[KVPool], AttentionBatch]:
    """Pools ``[N, Hkv, S, D]`` of one layer, and the batch that they share, as the layers of a model do."""
    blocks = Blocks(point, dummy=dummy)
    token = (
        jnp.asarray(blocks.first_tokens)[:, None] + jnp.arange(point.block_size, dtype=jnp.uint32)[None, :]
    )
    head = jnp.arange(point.num_kv_heads)[None, :, None, None]
    dim = jnp.arange(point.head_dim)[None, None, None, :]
    pools = [
        KVPool(*_keys_and_values(point, token[:, None, :, None], head, dim, index), 1)
        for index in range(num_sets)
    ]
    lengths = np.asarray(point.lengths, np.int32)
    last = lengths - 1
    slots = blocks.tables[np.arange(point.batch), last // point.block_size] * point.block_size
    batch = AttentionBatch(
        block_tables=jnp.asarray(blocks.tables),
        seq_lens=jnp.asarray(lengths),
        query_start_loc=jnp.arange(point.batch + 1, dtype=jnp.int32),
        rows=jnp.arange(point.batch, dtype=jnp.int32),
        positions=jnp.asarray(last),
        slots=jnp.asarray(slots + last % point.block_size),
    )
    return pools, batch


def with_queries(point: Point, batch: AttentionBatch, queries: Sequence[int]) -> AttentionBatch:
    """The batch of ``paged_sets`` with ``queries[row]`` query tokens at the end of each row; its slots are zeros."""
    counts = np.asarray(queries, np.int32)
    rows = np.repeat(np.arange(point.batch, dtype=np.int32), counts)
    starts = np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)])
    first = np.asarray(point.lengths, np.int32) - counts - starts[:-1]
    return replace(
        batch,
        query_start_loc=jnp.asarray(starts),
        rows=jnp.asarray(rows),
        positions=jnp.asarray(first[rows] + np.arange(len(rows), dtype=np.int32)),
        slots=jnp.zeros(len(rows), jnp.int32),
    )


Sets = list[tuple[jax.Array, jax.Array]]


def page_sets(point: Point, num_sets: int) -> tuple[Sets, tuple[jax.Array, jax.Array]]:
    """Keys and values ``[Hkv, N, S, D]``, with block tables and lengths: the layout of JAX's own kernel."""
    blocks = Blocks(point, dummy=False)
    token = (
        jnp.asarray(blocks.first_tokens)[:, None] + jnp.arange(point.block_size, dtype=jnp.uint32)[None, :]
    )
    head = jnp.arange(point.num_kv_heads)[:, None, None, None]
    dim = jnp.arange(point.head_dim)[None, None, None, :]
    sets = [_keys_and_values(point, token[None, :, :, None], head, dim, index) for index in range(num_sets)]
    return sets, (jnp.asarray(blocks.tables), jnp.asarray(point.lengths, jnp.int32))


def contiguous_sets(point: Point, num_sets: int) -> tuple[Sets, jax.Array]:
    """Keys and values ``[B, n, Hkv, D]`` and the lengths."""
    token = jnp.arange(point.batch * point.context, dtype=jnp.uint32).reshape(
        point.batch, point.context, 1, 1
    )
    head = jnp.arange(point.num_kv_heads)[None, None, :, None]
    dim = jnp.arange(point.head_dim)[None, None, None, :]
    sets = [_keys_and_values(point, token, head, dim, index) for index in range(num_sets)]
    return sets, jnp.asarray(point.lengths, jnp.int32)

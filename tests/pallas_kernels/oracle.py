"""Attention in plain numpy and float64, one query and one head at a time: shares nothing with the package.

And what tests of attention need of batches.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant, KVPool, paged_attention
from jaxpaged.pallas_kernels.paged_attention.cases import Case


def num_real(batch: AttentionBatch) -> int:
    """Tokens that are not padding."""
    return int(batch.query_start_loc[-1])


def one_row(
    inputs: tuple[jax.Array, KVPool, AttentionBatch], row: int, new: int, at: int
) -> tuple[jax.Array, KVPool, AttentionBatch]:
    """The ``new`` tokens from ``at`` on, the last of a row, as a batch of their own; its table as wide as before."""
    q, pool, batch = inputs
    alone = AttentionBatch(
        batch.block_tables[row : row + 1],
        batch.seq_lens[row : row + 1],
        jnp.array([0, new], jnp.int32),
        jnp.zeros(new, jnp.int32),
        batch.positions[at : at + new],
        batch.slots[at : at + new],
    )
    return q[at : at + new], pool, alone


def chunk(
    inputs: tuple[jax.Array, KVPool, AttentionBatch], row: int, at: int, count: int
) -> tuple[jax.Array, KVPool, AttentionBatch]:
    """``count`` tokens of a row from ``at`` on as a step of their own, as if those after them were not there."""
    q, pool, alone = one_row(inputs, row, count, at)
    return q, pool, replace(alone, seq_lens=alone.positions[-1:] + 1)


def softmax_attention(
    q: jax.Array, pool: KVPool, layer: int, batch: AttentionBatch, variant: AttentionVariant
) -> np.ndarray:
    """float64 ``[real tokens, Hq, D]``."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (q, pool.k, pool.v))
    tables, rows, positions = map(np.asarray, (batch.block_tables, batch.rows, batch.positions))
    head_dim, size = queries.shape[2], pool.block_size
    group = queries.shape[1] // keys.shape[1]
    scale = head_dim**-0.5 if variant.scale is None else variant.scale
    out = np.zeros((num_real(batch), *queries.shape[1:]))
    for token in range(len(out)):
        row, q_pos = int(rows[token]), int(positions[token])
        oldest = max(0, q_pos - (variant.sliding_window or q_pos + 1) + 1)
        at = np.arange(oldest, q_pos + 1)
        blocks = layer * pool.num_blocks + tables[row, at // size]
        for head in range(queries.shape[1]):
            k, v = keys[blocks, head // group, at % size], values[blocks, head // group, at % size]
            scores = k @ queries[token, head] * scale
            if variant.logit_soft_cap is not None:
                scores = variant.logit_soft_cap * np.tanh(scores / variant.logit_soft_cap)
            out[token, head] = _weigh(scores, v, variant, row, head, q_pos, at, tables.shape[1] * size)
    return out


def _weigh(
    scores: np.ndarray,
    v: np.ndarray,
    variant: AttentionVariant,
    row: int,
    head: int,
    q_pos: int,
    at: np.ndarray,
    length: int,
) -> np.ndarray:
    # Mods may be JAX functions: vectors of one length for all tokens compile only once.
    everywhere = np.arange(length)
    where = tuple(np.full(length, x) for x in (row, head, q_pos))
    if variant.score_mod is not None:
        padded = np.zeros(length)
        padded[at] = scores
        scores = np.asarray(variant.score_mod(padded, *where, everywhere), np.float64)[at]
    if variant.mask_mod is not None:
        visible = np.broadcast_to(np.asarray(variant.mask_mod(*where, everywhere)), length)[at]
        scores, v = scores[visible], v[visible]
    sinks = [] if variant.sinks is None else [float(variant.sinks[head])]
    logits = np.concatenate([scores, sinks])
    if not len(logits):
        return np.zeros(v.shape[1])
    weights = np.exp(logits - logits.max())
    return (weights / weights.sum())[: len(scores)] @ v


@cache
def compiled(
    name: str, layer: int, variant: AttentionVariant, deterministic: bool = False
) -> Callable[..., Any]:
    """One jitted call of an implementation; the variant is part of the program."""

    def call(q: jax.Array, pool: KVPool, batch: AttentionBatch) -> jax.Array:
        return paged_attention(
            q, pool, layer, batch, variant=variant, implementation=name, deterministic=deterministic
        )

    return jax.jit(call)


def attend(
    name: str,
    case: Case,
    inputs: tuple[jax.Array, KVPool, AttentionBatch],
    layer: int = 1,
    *,
    deterministic: bool = False,
) -> np.ndarray:
    """All tokens' outputs, padding included, in float64."""
    return np.asarray(compiled(name, layer, case.variant, deterministic)(*inputs), np.float64)

"""The shapes and variants that tests and benchmarks of paged attention share."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxpaged.pallas_kernels.batch import AttentionBatch, KVPool
from jaxpaged.pallas_kernels.variant import AttentionVariant


@dataclass(frozen=True)
class Case:
    """One ragged batch: ``rows`` holds (tokens already in the cache, query tokens) of each row."""

    name: str
    rows: tuple[tuple[int, int], ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    padding_tokens: int = 3
    padding_rows: int = 2
    num_layers: int = 2
    variant: AttentionVariant = field(default_factory=AttentionVariant)


def alibi(num_heads: int) -> AttentionVariant:
    """ALiBi (arXiv:2108.12409) with slopes as an array."""
    slopes = jnp.exp2(-8.0 * (jnp.arange(num_heads) + 1.0) / num_heads)
    return AttentionVariant(score_mod=lambda s, row, head, q_pos, kv_pos: s - slopes[head] * (q_pos - kv_pos))


def make_inputs(
    case: Case, seed: int = 0, dtype: DTypeLike = jnp.float32, poison: float = np.nan
) -> tuple[jax.Array, KVPool, AttentionBatch]:
    """Random queries and pool for a case; slots that no token owns hold ``poison`` (large values or NaN)."""
    rng = np.random.default_rng(seed)
    size = case.block_size
    blocks = [-(-(cached + new) // size) for cached, new in case.rows]
    num_blocks = sum(blocks) + 4
    ids = rng.permutation(num_blocks - 1)[: sum(blocks)] + 1
    num_rows, num_tokens = len(case.rows), sum(new for _, new in case.rows)
    tables = np.zeros((num_rows + case.padding_rows, max(blocks, default=0) + 1), np.int32)
    seq_lens = np.zeros(num_rows + case.padding_rows, np.int32)
    starts = np.full(num_rows + case.padding_rows + 1, num_tokens, np.int32)
    rows, positions, slots = (np.zeros(num_tokens + case.padding_tokens, np.int32) for _ in range(3))
    shape = (case.num_layers, num_blocks, case.num_kv_heads, size, case.head_dim)
    pools = [np.full(shape, poison, np.float32) for _ in range(2)]
    token = used = 0
    for row, (cached, new) in enumerate(case.rows):
        table = ids[used : used + blocks[row]]
        used += blocks[row]
        tables[row, : len(table)] = table
        seq_lens[row], starts[row] = cached + new, token
        at = np.arange(cached, cached + new)
        rows[token : token + new], positions[token : token + new] = row, at
        slots[token : token + new] = table[at // size] * size + at % size
        token += new
        every = np.arange(cached + new)
        for pool in pools:
            pool[:, table[every // size], :, every % size] = rng.standard_normal(
                (len(every), case.num_layers, case.num_kv_heads, case.head_dim)
            )
    q = rng.standard_normal((len(rows), case.num_heads, case.head_dim))
    k, v = (jnp.asarray(p.reshape(-1, *p.shape[2:]), dtype) for p in pools)
    arrays = (jnp.asarray(x) for x in (tables, seq_lens, starts, rows, positions, slots))
    return jnp.asarray(q, dtype), KVPool(k, v, case.num_layers), AttentionBatch(*arrays)


_MIXED = ((0, 7), (37, 1), (16, 16), (5, 1), (130, 1), (0, 33))

CASES: tuple[Case, ...] = (
    Case("decode", ((0, 1), (15, 1), (16, 1), (200, 1))),
    Case("one_token", ((0, 1),), padding_tokens=0, padding_rows=0),
    Case("prefill", ((0, 40), (0, 1), (0, 17))),
    Case("chunked_prefill", ((64, 40), (3, 13))),
    Case("mixed", _MIXED),
    Case("long_row", ((700, 1), (0, 300))),
    Case("many_rows", tuple((7 * i, 1) for i in range(33))),
    Case("speculative", ((30, 4), (31, 5), (0, 2))),
    Case("only_padding", ((0, 1),), padding_tokens=31, padding_rows=7),
    Case("mha", _MIXED, num_heads=4, num_kv_heads=4),
    Case("mqa", _MIXED, num_heads=8, num_kv_heads=1),
    Case("head_dim_96", _MIXED, head_dim=96),
    Case("head_dim_128", _MIXED, head_dim=128),
    Case("head_dim_256", _MIXED, num_heads=2, num_kv_heads=1, head_dim=256),
    Case("block_size_32", _MIXED, block_size=32),
    Case("block_size_128", _MIXED, block_size=128),
    Case("block_size_1", ((0, 5), (7, 1)), block_size=1),
    Case("scale", _MIXED, variant=AttentionVariant(scale=0.5)),
    Case("soft_cap", _MIXED, variant=AttentionVariant(logit_soft_cap=3.0)),
    Case("sliding_window", _MIXED, variant=AttentionVariant(sliding_window=20)),
    Case("window_of_one", _MIXED, variant=AttentionVariant(sliding_window=1)),
    Case("long_window", ((700, 1), (300, 40)), variant=AttentionVariant(sliding_window=100)),
    Case("sinks", _MIXED, variant=AttentionVariant(sinks=jnp.array([0.5, -1.0, 2.0, 0.0]))),
    Case("alibi", _MIXED, variant=alibi(4)),
    Case(
        "prefix_lm_like", _MIXED, variant=AttentionVariant(mask_mod=lambda r, h, q, k: (k < 8) | (q - k < 12))
    ),
    Case(
        "all_at_once",
        _MIXED,
        variant=AttentionVariant(
            scale=0.2,
            logit_soft_cap=5.0,
            sliding_window=50,
            sinks=jnp.array([0.5, -1.0, 2.0, 0.0]),
            score_mod=lambda s, r, h, q, k: s + 0.01 * (k % 3) - 0.1 * h,
            mask_mod=lambda r, h, q, k: (k % 5 != 0) | (q == k),
        ),
    ),
)

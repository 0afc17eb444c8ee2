"""Paged attention of a ragged batch by the prefill kernel: the launch, and what goes in and comes out.

Two launches at most: ``mosaic_prefill`` over the work list, and ``mosaic_join`` where rows may be split. XLA's part
is the plan, shared by all layers of a step, and the gather of the queries into tiles, into which it fuses what makes
them, the rotary embedding. (A bulk copy into swizzled shared memory begins at multiples of eight rows: a tile that
begins at any token could not be copied from ``[T, Hq, D]``.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxpaged.pallas_kernels.batch import AttentionBatch
from jaxpaged.pallas_kernels.mosaic_gpu import kernel
from jaxpaged.pallas_kernels.paged_attention.mosaic_join import join_partials
from jaxpaged.pallas_kernels.paged_attention.mosaic_operands import pack_operands, pack_queries
from jaxpaged.pallas_kernels.paged_attention.mosaic_plan import WorkPlan, make_plan
from jaxpaged.pallas_kernels.paged_attention.mosaic_prefill import (
    HALVES,
    ROWS,
    PrefillRefs,
    Scratch,
    attend_item,
    scratch_types,
)
from jaxpaged.pallas_kernels.paged_attention.mosaic_tile import LOG2E, TileShape, read_item
from jaxpaged.pallas_kernels.variant import AttentionVariant


def attend_ragged(
    shape: TileShape,
    q: jax.Array,
    pool: tuple[jax.Array, ...],
    base: jax.Array,
    batch: AttentionBatch,
    variant: AttentionVariant,
    *,
    split_budget: int,
    interpret: Any = None,
) -> jax.Array:
    """Attention over a layer of the pool.

    Args:
      shape: static sizes, of one half of a tile.
      q: ``[T, Hq, D]``; for a quantised pool with D as ``mosaic_codes.by_part`` has it, and so is the result's.
      pool: keys and values, ``[L*N, Hkv, S, D]``, or the words of their codes and float32 ``[L*N, Hkv, S]`` scales.
      base: int32 ``[1]``, the layer's first block.
      batch: see ``AttentionBatch``.
      variant: what ``shape`` does not say of it: its sinks and its mask.
      split_budget: how many items more than tiles there may be.
      interpret: see ``mosaic_gpu.kernel``.

    Returns:
      ``[T, Hq, D]``; zeros for padding tokens.
    """
    num_heads, (num_kv_heads, block_size) = q.shape[1], pool[0].shape[1:3]
    max_len = batch.block_tables.shape[1] * block_size
    plan = make_plan(
        batch,
        tile_q=HALVES * shape.tile_q,
        tile_kv=shape.config.tile_kv,
        sliding_window=shape.sliding_window,
        split_budget=split_budget,
        deterministic=False,
        max_len=max_len,
        in_place=True,
        mask_mod=variant.mask_mod,
        num_heads=num_heads,
    )
    keys = -(-max_len // shape.config.tile_kv) * shape.config.tile_kv
    by_half = halves(plan, shape.tile_q)
    operands = pack_operands(
        shape.mods,
        by_half,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        tile_m=ROWS,
        keys=keys,
    )
    row_sinks = None
    if variant.sinks is not None:
        grouped = variant.sinks.astype(jnp.float32).reshape(num_kv_heads, shape.group) * LOG2E
        row_sinks = grouped[:, jnp.arange(ROWS) % shape.group]
    optional = [x for x in (row_sinks, plan.key_tiles) if x is not None]
    extra = (*operands, *optional)
    launch = _Launch(
        shape, row_sinks is not None, plan.key_tiles is not None, len(operands), split_budget >= 2, interpret
    )
    packed = pack_queries(q, by_half, num_kv_heads, ROWS)
    arguments = (packed, *pool[:2], base, batch.block_tables, plan.items, plan.num_items, *pool[2:], *extra)
    out, *parts = launch(*arguments, num_parts=split_budget, num_tokens=q.shape[0])
    if parts:
        partials, log_sums = parts
        out = join_partials(
            out, partials, log_sums, plan.split_tiles, row_sinks, tile_q=shape.tile_q, interpret=interpret
        )
    return out.reshape(q.shape)


def halves(plan: WorkPlan, tile_q: int) -> WorkPlan:
    """The plan with the halves of its tiles in the place of its tiles, as far as operands need it."""
    first = plan.tile_first_pos[:, None] + tile_q * jnp.arange(HALVES, dtype=jnp.int32)[None, :]
    return plan._replace(
        tile_rows=jnp.repeat(plan.tile_rows, HALVES),
        tile_first_pos=first.reshape(-1),
        tile_tokens=plan.tile_tokens.reshape(-1, tile_q),
    )


@dataclass(frozen=True)
class _Launch:
    """The kernel over the work list; what is static."""

    shape: TileShape
    has_sinks: bool
    has_key_tiles: bool
    num_operands: int
    has_parts: bool
    interpret: Any

    def __call__(self, *arguments: jax.Array, num_parts: int, num_tokens: int) -> list[jax.Array]:
        """The result, and if rows may be split partial results and their log-sums."""
        q, k, items = arguments[0], arguments[1], arguments[5]
        num_kv_heads, head_dim = k.shape[1], q.shape[3]
        out_type = [jax.ShapeDtypeStruct((num_tokens, num_kv_heads, self.shape.group, head_dim), q.dtype)]
        if self.has_parts:
            rows = num_parts, num_kv_heads, HALVES, ROWS
            out_type += [
                jax.ShapeDtypeStruct((*rows, head_dim), jnp.float32),
                jax.ShapeDtypeStruct(rows, jnp.float32),
            ]
        types = scratch_types(self.shape, q.dtype, self.interpret is not None)
        names = [name for name, kind in vars(types).items() if kind is not None]
        found: list[jax.Array] = kernel(
            "paged_attention_prefill",
            partial(self._body, names, len(out_type)),
            out_type=out_type,
            grid=(items.shape[0], num_kv_heads),
            grid_names=("item", "head"),
            scratch_types=[getattr(types, name) for name in names],
            num_threads=HALVES + 1,
            thread_name="warpgroup",
            interpret=self.interpret,
        )(*arguments)
        return found

    def _body(self, names: list[str], num_outputs: int, *refs: Any) -> None:
        (q, k, v, base, tables, items, num_items), rest = refs[:7], list(refs[7:])
        take: Callable[[int], list[Any]] = lambda count: [rest.pop(0) for _ in range(count)]  # noqa: E731
        scales = take(0 if self.shape.kind is None else 2)
        operands, sinks = take(self.num_operands), take(self.has_sinks)
        key_tiles, outputs = take(self.has_key_tiles), take(num_outputs)
        scratch = Scratch(**dict(zip(names, rest, strict=True)))
        out, partials, log_sums = (*outputs, None, None)[:3]
        sink = sinks[0] if sinks else None
        mine = lax.axis_index("item")
        head = lax.axis_index("head")
        found = PrefillRefs(
            q, (k, v), tuple(scales), base, tables, sink, operands, out, partials, log_sums, scratch, head
        )
        listed = key_tiles[0] if key_tiles else None
        pl.when(mine < num_items[0])(lambda: attend_item(self.shape, found, read_item(items, mine, listed)))

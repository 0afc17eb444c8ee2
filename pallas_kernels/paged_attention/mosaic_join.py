"""Joins the partial results of the tiles that several items of the prefill kernel share, where their tokens are.

Grid: (tiles of several items, kv heads, tokens of a tile). A thread block joins the heads ``[G, D]`` of one token:
``BATCH`` partial results at a time so that their loads overlap, in the order of the items, by one online softmax. Most
thread blocks find that their tile has fewer tokens, or that there is no such tile, and end. The other tokens of
``out`` stay as they are.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.mosaic_gpu import kernel, store_global
from jaxpaged.pallas_kernels.variant import MASKED

BATCH = 4


def join_partials(
    out: jax.Array,
    partials: jax.Array,
    log_sums: jax.Array,
    split_tiles: jax.Array,
    sinks: jax.Array | None,
    *,
    tile_q: int,
    interpret: Any = None,
) -> jax.Array:
    """Writes the results of split tiles into ``out``, in place.

    Args:
      out: ``[T, Hkv, G, D]``.
      partials: float32 ``[W, Hkv, 2, 64, D]``, rows ``token * G + head`` of each half of a tile.
      log_sums: float32 ``[W, Hkv, 2, 64]``, base 2.
      split_tiles: see ``WorkPlan``.
      sinks: float32 ``[Hkv, 64]``, base 2, one logit for each row, or None.
      tile_q: tokens of a half.
      interpret: see ``mosaic_gpu.kernel``.
    """
    _, num_kv_heads, group, head_dim = out.shape
    rows = next(m for m in (16, 32, 64) if m >= group)
    held = jax.new_ref(out)
    extra = () if sinks is None else (sinks,)
    kernel(
        "paged_attention_join",
        partial(_body, tile_q, rows, len(extra)),
        grid=(split_tiles.shape[0], num_kv_heads, 2 * tile_q),
        grid_names=("tile", "head", "token"),
        scratch_types=[plgpu.SMEM((rows, head_dim), out.dtype, transforms=())],
        interpret=interpret,
    )(held, partials, log_sums, split_tiles, *extra)
    return jax.freeze(held)


def _body(
    tile_q: int, rows: int, has_sinks: int, out: Any, partials: Any, log_sums: Any, tiles: Any, *rest: Any
) -> None:
    tile, head, token = (lax.axis_index(name) for name in ("tile", "head", "token"))
    first, count, first_token, num_tokens = (tiles[tile, column] for column in range(4))
    group, head_dim = out.shape[2:]
    staged = rest[has_sinks]
    layout = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=rows // 16)
    half, place = lax.div(token, jnp.int32(tile_q)), lax.rem(token, jnp.int32(tile_q))
    # The last tokens' rows end before a whole set of rows does: their set begins earlier, and they come last in it.
    first_row = jnp.minimum(place * group, 64 - rows)
    mine = pl.ds(first_row, rows)

    def join() -> None:
        row = layout.reduce(1)
        full = lambda value: plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), row)  # noqa: E731
        if has_sinks:
            top, total = plgpu.load(rest[0].at[head, mine], layout=row, optimized=False), full(1.0)
        else:
            top, total = full(MASKED), full(0.0)
        acc = plgpu.layout_cast(jnp.zeros((rows, head_dim), jnp.float32), layout)

        def batch(i: Any, carry: Any) -> Any:
            acc, top, total = carry
            parts, logs = [], []
            for j in range(BATCH):
                index = i * BATCH + j
                at = first + jnp.minimum(index, count - 1), head, half, mine
                parts.append(plgpu.load(partials.at[at], layout=layout, optimized=False))
                log = plgpu.load(log_sums.at[at], layout=row, optimized=False)
                logs.append(
                    log + jnp.where(index < count, 0.0, 2 * MASKED)
                )  # past the last: below all that counts
            new_top = top
            for log in logs:
                new_top = jnp.maximum(new_top, log)
            decay = jnp.exp2(top - new_top)
            acc, total = acc * lax.broadcast_in_dim(decay, acc.shape, [0]), total * decay
            for held, log in zip(parts, logs, strict=True):
                # An item that saw no key weighs nothing, also where no other item saw one.
                weight = jnp.where(log > MASKED, jnp.exp2(log - new_top), 0.0)
                acc = acc + held * lax.broadcast_in_dim(weight, acc.shape, [0])
                total = total + weight
            return acc, new_top, total

        rounds = lax.div(count + (BATCH - 1), jnp.int32(BATCH))
        acc, top, total = lax.fori_loop(0, rounds, batch, (acc, top, total))
        safe = jnp.where(total == 0.0, 1.0, total)
        store_global(staged, (acc / lax.broadcast_in_dim(safe, acc.shape, [0])).astype(out.dtype))
        plgpu.commit_smem()
        source = staged.at[pl.ds(place * group - first_row, group)]
        plgpu.copy_smem_to_gmem(source, out.at[first_token + token, head])
        plgpu.wait_smem_to_gmem(0)

    pl.when((count > 0) & (token < num_tokens))(join)

"""Attention of many query tokens on Hopper: a warpgroup that copies, two that compute, results in place.

A tile is two halves of 64 rows, each of one computing warpgroup: as many query tokens as fit, with the query heads of
one kv head each, in rows ``token * G + head``. Results go straight to their tokens, one bulk copy for each, so that
a tile may end with its row of the batch. An item that is only a part of its tile's keys leaves a partial result for
``mosaic_join`` instead.

The two warpgroups take turns: while one computes its softmax the other has the tensor cores. Keys and values have
barriers of their own, so that the next keys are on their way while values are still read. Tiles of keys that all
queries of a half see are multiplied without masks; those that none sees belong to no item, but for one at most that
only the other half sees, which is passed over.

Codes of a quantised pool come with their scales; each half makes numbers of them in shared memory, where its products
take them from, one tile at a time (``mosaic_codes``).

What no query sees may be anything, NaN included. Values of such keys are set to zero by the copying warpgroup: two
readers cannot each do it for themselves.

Numerics as in ``mosaic_mma``. Method: FlashAttention-3 (arXiv:2407.08608), its first kind of overlap, and the order of
barriers of JAX's ``jax/experimental/pallas/ops/gpu/attention_mgpu.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.mosaic_gpu import store_global
from jaxpaged.pallas_kernels.paged_attention.mosaic_codes import WORD
from jaxpaged.pallas_kernels.paged_attention.mosaic_ring import Ring
from jaxpaged.pallas_kernels.paged_attention.mosaic_tile import (
    LOG2E,
    Item,
    TileShape,
    block_ids,
    clear_unseen_rows,
    first_key,
    first_key_in_block,
    has_unseen_keys,
    modify,
    operands_of,
    softmax_weights,
)
from jaxpaged.pallas_kernels.paged_attention.mosaic_wgmma import add_product, to_multiply
from jaxpaged.pallas_kernels.variant import MASKED

HALVES = 2
ROWS = 64
_COPY = HALVES  # the warpgroup after those that compute
# Registers of a thread: together no more than the launch's 168 of each ("setmaxnreg", PTX ISA), so that all three
# warpgroups find theirs. Nothing spills at any head dimension, nor with codes up to 128.
_COPY_REGISTERS, _COMPUTE_REGISTERS = 40, 232
# Of a quantised pool, whose scales have addresses of their own.
_COPY_REGISTERS_OF_CODES, _COMPUTE_REGISTERS_OF_CODES = 56, 224


@dataclass(frozen=True)
class PrefillRefs:
    """References of a launch: operands, results, scratch; and the kv head of this thread block."""

    q: Any  # [2 * P, Hkv, ROWS, D]
    pool: tuple[Any, Any]  # [L*N, Hkv, S, D], or words of codes
    scales: tuple[Any, ...]  # float32 [L*N, Hkv, S], of keys and of values; none of a pool without
    base: Any
    tables: Any
    sinks: Any | None  # float32 [Hkv, ROWS], base 2
    operands: Sequence[Any]
    out: Any  # [T, Hkv, G, D]
    partials: Any | None  # float32 [W, Hkv, HALVES, ROWS, D]
    log_sums: Any | None  # float32 [W, Hkv, HALVES, ROWS]
    scratch: "Scratch"
    head: Any


@dataclass(frozen=True)
class Scratch:
    """Shared memory of a thread block; barriers are one for each half or for each slot of the ring."""

    queries: Any
    results: Any
    keys: Any
    values: Any
    queries_there: Any
    keys_there: Any
    values_there: Any
    values_cleared: Any
    keys_read: Any
    values_read: Any
    turn: Any
    key_scales: Any = None
    value_scales: Any = None
    numbers: Any = None  # codes as the products take them, of one tile for each half
    weights: Any = None  # for the interpreter, which takes the left operand from shared memory only


def result_columns(head_dim: int) -> int:
    """Columns of results that are in shared memory at a time: all, or where D is large what is left of it.

    A token's copy begins at a multiple of 128 bytes (PTX ISA, "cp.async.bulk.tensor"): 64 columns of any group do.
    """
    return head_dim if head_dim <= 128 else 64


def scratch_types(shape: TileShape, dtype: Any, interpreted: bool) -> Scratch:
    """What the kernel needs; ``shape`` is that of a half."""
    stages, tile_kv, head_dim = shape.config.stages, shape.config.tile_kv, shape.head_dim

    has_codes = shape.kind is not None
    ring = plgpu.SMEM((stages, tile_kv, shape.ring_width), WORD if has_codes else dtype)
    scales = plgpu.SMEM((stages, tile_kv), jnp.float32) if has_codes else None
    filled = [
        plgpu.Barrier(num_arrivals=copies * shape.blocks_per_tile, num_barriers=stages)
        for copies in (1 + 2 * has_codes, 1)
    ]
    read = plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages)
    return Scratch(
        queries=plgpu.SMEM((HALVES, ROWS, head_dim), dtype),
        # Plain rows: the copies out of it begin at any token.
        results=plgpu.SMEM((HALVES, ROWS, result_columns(head_dim)), dtype, transforms=()),
        keys=ring,
        values=ring,
        queries_there=plgpu.Barrier(num_barriers=HALVES),
        keys_there=filled[0],
        values_there=filled[1],
        values_cleared=plgpu.Barrier(num_barriers=stages),
        keys_read=read,
        values_read=read,
        turn=plgpu.Barrier(num_arrivals=HALVES),
        key_scales=scales,
        value_scales=scales,
        numbers=plgpu.SMEM((HALVES, tile_kv, head_dim), dtype) if has_codes else None,
        weights=plgpu.SMEM((HALVES, ROWS, tile_kv), dtype) if interpreted else None,
    )


def attend_item(shape: TileShape, refs: PrefillRefs, item: Item) -> None:
    """Attends one item: copies, or computes a half, by the warpgroup that this is."""
    warpgroup = lax.axis_index("warpgroup")
    registers = _COPY_REGISTERS, _COMPUTE_REGISTERS
    if shape.kind is not None:
        registers = _COPY_REGISTERS_OF_CODES, _COMPUTE_REGISTERS_OF_CODES
    # What there is to copy ends with the row, not with the tile.
    copied = replace(item, last_pos=item.last_key)

    @pl.when(warpgroup == _COPY)
    def _() -> None:
        plgpu.set_max_registers(registers[0], action="decrease")
        _copy(shape, refs, copied)

    @pl.when(warpgroup < HALVES)
    def _() -> None:
        plgpu.set_max_registers(registers[1], action="increase")
        _Half(shape, refs, item, copied, warpgroup).attend()


def _slot(shape: TileShape, step: Any) -> Any:
    return lax.rem(step, jnp.int32(shape.config.stages))


def _copy(shape: TileShape, refs: PrefillRefs, item: Item) -> None:
    """Fills the ring, keys and values apart, as its slots are read."""
    scratch, stages, has_codes = refs.scratch, shape.config.stages, shape.kind is not None
    ids_of: Callable[[Any], list[Any]] = partial(block_ids, shape, refs.tables, refs.base[0], item)

    def fill(step: Any, ids: list[Any], pool: Any, ring: Any, there: Any, scales: Sequence[Any] = ()) -> None:
        slot = _slot(shape, step)
        rows = pl.ds(first_key_in_block(shape, item, step), shape.copy_rows)

        def copy_all() -> None:
            for part, block in enumerate(ids):
                place = slot, pl.ds(part * shape.copy_rows, shape.copy_rows)
                for source, target in scales:
                    # Not zeros out of bounds: then it is a plain bulk copy, which may begin anywhere on 16 bytes.
                    mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
                    scale = source.at[block, refs.head, rows]
                    plgpu.copy_gmem_to_smem(scale, target.at[place], there.at[slot], oob_mode=mode)
                plgpu.copy_gmem_to_smem(pool.at[block, refs.head, rows], ring.at[place], there.at[slot])

        # By one warp: copies that a whole warpgroup issues have a barrier of the warpgroup before each.
        plgpu.warp_map(lambda warp: pl.when(warp == 0)(copy_all))

    def clear(step: Any) -> None:
        slot = _slot(shape, step)
        plgpu.barrier_wait(scratch.values_there.at[slot])
        clear_unseen_rows(shape, item, step, scratch.values.at[slot])
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.values_cleared.at[slot])

    def wait_values_read(step: Any) -> None:
        slot = _slot(shape, step)
        plgpu.barrier_wait(scratch.values_read.at[slot])
        if has_codes:
            return
        # Long there. But who waits at a barrier now and then has to see all of its phases.
        unobserved = jnp.logical_not(has_unseen_keys(shape, item, step))
        pl.when(unobserved)(lambda: plgpu.barrier_wait(scratch.values_there.at[slot]))

    @pl.loop(0, item.steps)
    def _(i: Any) -> None:
        # Read before the wait, so that both are under way together.
        ids, slot, reused = ids_of(i), _slot(shape, i), i >= stages
        pl.when(reused)(lambda: plgpu.barrier_wait(scratch.keys_read.at[slot]))
        # Scales of values with the keys, too: weights are scaled before values are waited for.
        scales = tuple(zip(refs.scales, (scratch.key_scales, scratch.value_scales), strict=False))
        fill(i, ids, refs.pool[0], scratch.keys, scratch.keys_there, scales)
        pl.when(reused)(lambda: wait_values_read(i - stages))
        fill(i, ids, refs.pool[1], scratch.values, scratch.values_there)
        if not has_codes:  # which are never NaN
            pl.when(has_unseen_keys(shape, item, i))(lambda: clear(i))

    # The last reads too: nothing is left to observe when the thread block ends.
    @pl.loop(jnp.maximum(item.steps - stages, 0), item.steps)
    def _(i: Any) -> None:
        plgpu.barrier_wait(scratch.keys_read.at[_slot(shape, i)])
        wait_values_read(i)


class _Half:
    """A computing warpgroup's part of an item: its tokens, and the steps in which it has something to do."""

    def __init__(self, shape: TileShape, refs: PrefillRefs, whole: Item, copied: Item, half: Any) -> None:
        self.shape, self.refs, self.scratch, self.half = shape, refs, refs.scratch, half
        self.whole, self.copied = whole, copied
        first_token = half * shape.tile_q
        first = whole.first_pos + first_token
        last = jnp.minimum(first + (shape.tile_q - 1), whole.last_pos)
        self.num_tokens = jnp.maximum(last - first + 1, 0)
        self.token = whole.token + first_token
        # Its own item: the same keys, other queries. Without tokens it does no step.
        self.item = replace(whole, tile=whole.tile * HALVES + half, first_pos=first, last_pos=last)
        self.layout = plgpu.Layout.WGMMA
        held = [self.scratch.keys, self.scratch.values, self.scratch.keys_there, self.scratch.values_there]
        held += [self.scratch.key_scales, self.scratch.value_scales] * (shape.kind is not None)
        self.ring = Ring(shape, refs, self.item, held)

    def attend(self) -> None:
        """Queries in, all steps, result out."""
        shape, refs, scratch = self.shape, self.refs, self.scratch
        mine, there = scratch.queries.at[self.half], scratch.queries_there.at[self.half]
        plgpu.copy_gmem_to_smem(refs.q.at[self.item.tile, refs.head], mine, there)
        operands = operands_of(shape, self.item, refs.head, refs.operands, self.layout)
        plgpu.barrier_wait(there)
        full_begin, full_end, end = self._ranges()
        carry = self._start()
        # The second half is one turn behind the first.
        pl.when(self.half == 1)(self._take_turn)
        masked, unmasked = partial(self._step, operands, True), partial(self._step, operands, False)
        if shape.sliding_window is not None:
            carry = lax.fori_loop(0, full_begin, masked, carry)
        carry = lax.fori_loop(full_begin, full_end, unmasked, carry)
        carry = lax.fori_loop(full_end, end, masked, carry)
        pl.loop(end, self.whole.steps)(self._pass_over)
        pl.when(self.half == 0)(self._take_turn)
        self._finish(*carry)

    def _ranges(self) -> tuple[Any, Any, Any]:
        """Steps from which on all keys are seen by all queries, from which on no longer, and where it ends."""
        tile_kv, begin = jnp.int32(self.shape.config.tile_kv), self.item.begin
        end = lax.div(self.item.last_pos, tile_kv) + 1 - begin
        end = jnp.where(self.num_tokens > 0, jnp.clip(end, 0, self.whole.steps), 0)
        if self.item.key_tiles is not None:  # with a mask_mod no step goes without a mask
            return jnp.int32(0), jnp.int32(0), jnp.where(self.num_tokens > 0, self.whole.steps, 0)
        full_begin = jnp.int32(0)
        if self.shape.sliding_window is not None:
            # Of the half's last query, whose window begins latest.
            oldest = jnp.maximum(self.item.last_pos - (self.shape.sliding_window - 1), 0)
            full_begin = jnp.clip(lax.div(oldest + (tile_kv - 1), tile_kv) - begin, 0, end)
        full_end = jnp.clip(lax.div(self.item.first_pos + 1, tile_kv) - begin, full_begin, end)
        return full_begin, full_end, end

    def _start(self) -> tuple[Any, Any, Any]:
        fill = lambda value, to, *extent: plgpu.layout_cast(jnp.full(extent, value, jnp.float32), to)  # noqa: E731
        row = self.layout.reduce(1)
        return (
            fill(0.0, self.layout, ROWS, self.shape.head_dim),
            fill(MASKED, row, ROWS),
            fill(0.0, row, ROWS),
        )

    def _take_turn(self) -> None:
        plgpu.barrier_arrive(self.scratch.turn)
        plgpu.barrier_wait(self.scratch.turn)

    def _wait_values(self, step: Any) -> None:
        slot = _slot(self.shape, step)
        plgpu.barrier_wait(self.scratch.values_there.at[slot])
        if self.shape.kind is not None:
            return
        pl.when(has_unseen_keys(self.shape, self.copied, step))(
            lambda: plgpu.barrier_wait(self.scratch.values_cleared.at[slot])
        )

    def _pass_over(self, step: Any) -> None:
        """A step that only the other half takes."""
        slot, scratch = _slot(self.shape, step), self.scratch
        plgpu.barrier_wait(scratch.keys_there.at[slot])
        plgpu.barrier_arrive(scratch.keys_read.at[slot])
        self._take_turn()
        self._wait_values(step)
        plgpu.barrier_arrive(scratch.values_read.at[slot])
        self._take_turn()

    def _step(self, operands: Any, masked: bool, step: Any, carry: Any) -> Any:
        shape, scratch = self.shape, self.scratch
        acc, top, total = carry
        slot = _slot(shape, step)
        plgpu.barrier_wait(scratch.keys_there.at[slot])
        numbers = None if scratch.numbers is None else scratch.numbers.at[self.half]
        keys = to_multiply(self.ring, scratch.keys.at[slot], numbers)

        def product_with_keys(scores: Any) -> Any:
            plgpu.wgmma(scores, scratch.queries.at[self.half], keys.T)
            self._take_turn()
            return scores[...]

        extent = ROWS, shape.config.tile_kv
        scores = pl.run_scoped(product_with_keys, plgpu.WGMMAAccumulatorRef(extent, jnp.float32))
        scores = self.ring.scaled_by_keys(step, scores, self.layout)
        if shape.kind is None:
            plgpu.barrier_arrive(scratch.keys_read.at[slot])
        if masked or shape.mods or shape.logit_soft_cap is not None:
            # Not before the product: there are no registers for them beside its operands.
            loaded = operands.at(first_key(shape, self.item, step))
            scores, visible = modify(shape, self.item, step, self.refs.head, scores, loaded, self.layout)
            weights, decay, top = softmax_weights(scores, visible, top)
        else:
            factor = shape.scale * LOG2E
            new_top = jnp.maximum(top, scores.max(axis=1) * factor)
            weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(new_top, extent, [0]))
            decay, top = jnp.exp2(top - new_top), new_top
        acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
        total = total * decay + weights.sum(axis=1)
        packed = self.ring.scaled_for_values(step, weights, self.layout).astype(self.refs.q.dtype)
        plgpu.barrier_arrive(scratch.turn)  # the softmax is done
        self._wait_values(step)
        plgpu.barrier_wait(scratch.turn)  # the tensor cores are free
        staging = [] if scratch.weights is None else [scratch.weights.at[self.half]]
        values = to_multiply(self.ring, scratch.values.at[slot], numbers)
        if shape.kind is not None:
            # All of the slot is read, the values' scales too, which came with the keys.
            plgpu.barrier_arrive(scratch.keys_read.at[slot])
            plgpu.barrier_arrive(scratch.values_read.at[slot])
        acc = add_product(acc, packed, staging, values)
        if shape.kind is None:
            plgpu.barrier_arrive(scratch.values_read.at[slot])
        return acc, top, total

    def _finish(self, acc: Any, top: Any, total: Any) -> None:
        """Writes the result, or the partial one."""
        refs, part = self.refs, self.whole.part
        partials, log_sums = refs.partials, refs.log_sums
        if partials is None or log_sums is None:
            self._store(acc, top, total)
            return
        pl.when(part < 0)(lambda: self._store(acc, top, total))

        @pl.when((part >= 0) & (self.num_tokens > 0))
        def _() -> None:
            safe = jnp.where(total == 0.0, 1.0, total)
            place = part, refs.head, self.half
            store_global(partials.at[place], acc / lax.broadcast_in_dim(safe, acc.shape, [0]))
            store_global(log_sums.at[place], jnp.where(total == 0.0, MASKED, top + jnp.log2(safe)))

    def _store(self, acc: Any, top: Any, total: Any) -> None:
        """Results of the half's tokens, each ``[G, D]``."""
        refs, group, head_dim = self.refs, self.shape.group, self.shape.head_dim
        if refs.sinks is not None:
            sinks = plgpu.load(refs.sinks.at[refs.head], layout=self.layout.reduce(1), optimized=False)
            # Relative to the larger of both: either may be far above the other.
            new_top = jnp.maximum(top, sinks)
            decay = jnp.exp2(top - new_top)
            acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
            total = total * decay + jnp.exp2(sinks - new_top)
        safe = jnp.where(total == 0.0, 1.0, total)
        result = (acc / lax.broadcast_in_dim(safe, acc.shape, [0])).astype(refs.out.dtype)
        staged = self.scratch.results.at[self.half]
        width = result_columns(head_dim)
        for column in range(0, head_dim, width):
            store_global(staged, lax.slice(result, (0, column), (ROWS, column + width)))
            plgpu.commit_smem()
            columns = pl.ds(column, width)

            @pl.loop(0, self.num_tokens)
            def _(i: Any, columns: Any = columns) -> None:
                source = staged.at[pl.ds(i * group, group)]
                plgpu.copy_smem_to_gmem(source, refs.out.at[self.token + i, refs.head, :, columns])

            plgpu.wait_smem_to_gmem(0)

"""The ring of buffers through which keys and values reach the products, and the copies that fill it.

A step is one tile of keys and one of values, brought block by block: by bulk copies (TMA) that complete on a
barrier of the slot, one for keys and one for values, or before Hopper by ``cp.async``, whose groups are counted.
Codes of a quantised pool come as words (``mosaic_codes``) with their scales: by bulk copies too, or before Hopper,
where 64 bytes are too few for a warpgroup to copy, through registers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.paged_attention.mosaic_codes import WORD, parts_of, unit_of
from jaxpaged.pallas_kernels.paged_attention.mosaic_tile import Item, TileShape, block_ids, first_key_in_block

# Without TMA: the next step's scales in registers, keys' first, and the blocks of the step after it.
ScalesAhead = tuple[list[jax.Array], list[Any]]


def ring_scratch(shape: TileShape, dtype: Any) -> list[Any]:
    """Scratch of a kernel: buffers of keys and of values, their barriers (none without TMA), and buffers of scales."""
    config = shape.config
    extent = (config.stages, config.tile_kv, shape.ring_width)
    held = dtype if shape.kind is None else WORD
    # One slot is enough for what comes through registers.
    scales = plgpu.SMEM((config.stages if shape.has_tma else 1, config.tile_kv), jnp.float32)
    after = [] if shape.kind is None else [scales, scales]
    if not shape.has_tma:
        swizzle = swizzle_for_cp_async(shape.copy_rows, shape.ring_width)
        assert swizzle is not None, f"no swizzle for copies of {shape.copy_rows} rows of {shape.ring_width}"
        # Their stubs leave out a method that the classes inherit.
        tiling = plgpu.TilingTransform((8, swizzle // 2))  # type: ignore[abstract]
        transforms = tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
        return [plgpu.SMEM(extent, held, transforms=transforms)] * 2 + after
    buffer = plgpu.SMEM(extent, held)
    filled = [
        plgpu.Barrier(num_arrivals=copies * shape.blocks_per_tile, num_barriers=config.stages)
        for copies in (1 + len(after), 1)
    ]
    return [buffer, buffer, *filled, *after]


def swizzle_for_cp_async(rows: int, width: int) -> int | None:
    """Bytes of the widest swizzle that the compiler can copy to: tiles of 8 rows, a multiple of one for each warp.

    Wider means fewer bank conflicts. With TMA the compiler's own choice, the widest that divides a row, always works.
    None for few rows of 16 or 48 elements, which only codes have.
    """
    for swizzle in (128, 64, 32):
        columns, rest = divmod(2 * width, swizzle)
        if rest == 0 and (rows // 8) * columns % 4 == 0:
            return swizzle
    return None


@runtime_checkable
class PoolRefs(Protocol):
    """What a ring asks of a kernel's references; see ``mosaic_launch.KernelRefs``."""

    @property
    def q(self) -> Any: ...
    @property
    def pool(self) -> tuple[Any, Any]: ...
    @property
    def scales(self) -> tuple[Any, ...]: ...
    @property
    def base(self) -> Any: ...
    @property
    def tables(self) -> Any: ...
    @property
    def head(self) -> Any: ...


class Ring:
    """Which copies are issued when, and how to wait for them; ``scratch`` begins with that of ``ring_scratch``."""

    def __init__(self, shape: TileShape, refs: PoolRefs, item: Item, scratch: Sequence[Any]) -> None:
        self.shape, self.item, self.pool, self.head = shape, item, refs.pool, refs.head
        self.dtype = refs.q.dtype
        self.keys, self.values, *rest = scratch
        self.barriers, rest = (rest[:2], rest[2:]) if shape.has_tma else ([], rest)
        self.pool_scales, self.scales = refs.scales, rest[: len(refs.scales)]
        self.others = rest[len(refs.scales) :]
        self.ids: Callable[[Any], list[Any]] = partial(block_ids, shape, refs.tables, refs.base[0], item)

    def slot(self, step: Any) -> Any:
        """The buffer of a step."""
        return lax.rem(step, jnp.int32(self.shape.config.stages))

    def issue(self, step: Any, ids: list[Any]) -> None:
        """Starts the copies of a step. Past the last one: none, or with cp.async, whose groups are counted, again."""
        if not self.shape.has_tma:
            # An item without steps reads keys as well, and looks at none.
            last = jnp.maximum(self.item.steps - 1, 0)
            self._copy(jnp.minimum(step, last), self.slot(step), ids)
            return

        @pl.when(step < self.item.steps)
        def _() -> None:
            self._copy(step, self.slot(step), ids)

    def _copy(self, step: Any, slot: Any, ids: list[Any]) -> None:
        shape = self.shape
        rows = pl.ds(first_key_in_block(shape, self.item, step), shape.copy_rows)

        def copy_all() -> None:
            if shape.has_tma:
                self._copy_scales(slot, ids, rows)
            for which, (pool, ring) in enumerate(zip(self.pool, (self.keys, self.values), strict=True)):
                for part, block in enumerate(ids):
                    source = pool.at[block, self.head, rows]
                    target = ring.at[slot, pl.ds(part * shape.copy_rows, shape.copy_rows)]
                    if shape.has_tma:
                        plgpu.copy_gmem_to_smem(source, target, self.barriers[which].at[slot])
                    else:
                        plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

        if not shape.has_tma:
            copy_all()
            return

        # By one warp: copies that a whole warpgroup issues have a barrier of the warpgroup before each.
        plgpu.warp_map(lambda warp: pl.when(warp == 0)(copy_all))

    def _copy_scales(self, slot: Any, ids: list[Any], rows: Any) -> None:
        """Those of values on the keys' barrier, too: weights are scaled before values are waited for."""
        for pool, ring in zip(self.pool_scales, self.scales, strict=True):
            for part, block in enumerate(ids):
                target = ring.at[slot, pl.ds(part * self.shape.copy_rows, self.shape.copy_rows)]
                # Not zeros out of bounds: then it is a plain bulk copy, which may begin anywhere on 16 bytes.
                mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
                source = pool.at[block, self.head, rows]
                plgpu.copy_gmem_to_smem(source, target, self.barriers[0].at[slot], oob_mode=mode)

    def first_scales(self) -> ScalesAhead:
        """Before the first step, for ``next_scales``."""
        return self._load_scales(jnp.int32(0), self._scale_ids(jnp.int32(0)))

    def next_scales(self, step: Any, held: ScalesAhead) -> ScalesAhead:
        """Without TMA: the scales of a step to shared memory, all threads having read the last, and more under way."""
        loaded, ids = held
        for ring, scales in zip(self.scales if loaded else [], loaded, strict=True):
            ring[0] = scales
        return self._load_scales(step + 1, ids)

    def _load_scales(self, step: Any, ids: list[Any]) -> ScalesAhead:
        rows = pl.ds(first_key_in_block(self.shape, self.item, step), self.shape.copy_rows)
        # Columns of a result, over as many warps as there are keys for: two numbers of a thread for each 16 or 32.
        few = plgpu.Layout.MMA_ACC(jnp.float32, m_warps=2 if self.shape.copy_rows == 16 else 1).reduce(0)

        def load(pool: Any) -> jax.Array:
            parts = [plgpu.load(pool.at[b, self.head, rows], layout=few, optimized=False) for b in ids]
            # Each store has two barriers of the warpgroup: one for all blocks.
            return jnp.concatenate(parts)

        return [load(pool) for pool in self.pool_scales] if ids else [], self._scale_ids(step + 1)

    def _scale_ids(self, step: Any) -> list[Any]:
        return self.ids(step) if self.pool_scales and not self.shape.has_tma else []

    def operands(self, tile: Any, layout: Any) -> list[jax.Array]:
        """A tile of keys or values in registers: one operand, or one for each part of its words (``mosaic_codes``)."""
        held = plgpu.load(tile, layout=layout, optimized=False)
        kind = self.shape.kind
        if kind is None:
            return [held]
        return parts_of(held, kind, self.dtype, layout, interpreted=self.shape.interpreted)

    def scaled_by_keys(self, step: Any, scores: jax.Array, layout: Any) -> jax.Array:
        """Products with keys' codes to products with keys; ``[M, tile_kv]`` in ``layout``."""
        return scores if self.shape.kind is None else scores * self._scales(0, step, scores.shape, layout)

    def scaled_for_values(self, step: Any, weights: jax.Array, layout: Any) -> jax.Array:
        """Weights of values to those of their codes; ``[M, tile_kv]`` in ``layout``."""
        if self.shape.kind is None:
            return weights
        scaled = weights * self._scales(1, step, weights.shape, layout)
        # The scales of what is not seen may be anything, NaN included.
        return jnp.where(weights > 0.0, scaled, jnp.zeros_like(scaled))

    def _scales(self, which: int, step: Any, extent: tuple[int, ...], layout: Any) -> jax.Array:
        assert self.shape.kind is not None
        slot = self.slot(step) if self.shape.has_tma else 0
        line = plgpu.load(self.scales[which].at[slot], layout=layout.reduce(0), optimized=False)
        return lax.broadcast_in_dim(line * unit_of(self.shape.kind, self.dtype), extent, [1])

    def wait_keys(self, step: Any) -> None:
        """Until the keys of a step are there; with cp.async its values too."""
        if self.shape.has_tma:
            plgpu.barrier_wait(self.barriers[0].at[self.slot(step)])
        else:
            plgpu.wait_gmem_to_smem((self.shape.config.stages - 1) * 2 * self.shape.blocks_per_tile)

    def wait_values(self, step: Any) -> None:
        """Until the values of a step are there."""
        if self.shape.has_tma:
            plgpu.barrier_wait(self.barriers[1].at[self.slot(step)])

    def before_reuse(self) -> None:
        """All warps have read the slot that is filled next; ordinary reads come before the copy engine's writes."""
        if self.shape.has_tma:  # cp.async is preceded by a barrier of its own
            plgpu.commit_smem()

    def finish(self) -> None:
        """Until no copy is under way."""
        if not self.shape.has_tma:
            plgpu.wait_gmem_to_smem(0)

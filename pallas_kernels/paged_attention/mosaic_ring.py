"""The ring of buffers through which keys and values reach the products, and the copies that fill it.

A step is one tile of keys and one of values, brought block by block: by bulk copies (TMA) that complete on a
barrier of the slot, one for keys and one for values, or before Hopper by ``cp.async``, whose groups are counted.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.paged_attention.mosaic_launch import KernelRefs
from jaxpaged.pallas_kernels.paged_attention.mosaic_tile import Item, TileShape, block_ids, first_key_in_block


def ring_scratch(shape: TileShape, dtype: Any) -> list[Any]:
    """Scratch of a kernel: buffers of keys and of values, then their barriers, none without TMA."""
    config = shape.config
    extent = (config.stages, config.tile_kv, shape.head_dim)
    if not shape.has_tma:
        swizzle = _swizzle_for_cp_async(shape.copy_rows, shape.head_dim)
        # Their stubs leave out a method that the classes inherit.
        tiling = plgpu.TilingTransform((8, swizzle // 2))  # type: ignore[abstract]
        transforms = tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
        return [plgpu.SMEM(extent, dtype, transforms=transforms)] * 2
    buffer = plgpu.SMEM(extent, dtype)
    barrier = plgpu.Barrier(num_arrivals=shape.blocks_per_tile, num_barriers=config.stages)
    return [buffer, buffer, barrier, barrier]


def _swizzle_for_cp_async(rows: int, head_dim: int) -> int:
    """Bytes of the widest swizzle that the compiler can copy to: tiles of 8 rows, a multiple of one for each warp.

    Wider means fewer bank conflicts. With TMA the compiler's own choice, the widest that divides a row, always works.
    """
    for swizzle in (128, 64, 32):
        columns, rest = divmod(2 * head_dim, swizzle)
        if rest == 0 and (rows // 8) * columns % 4 == 0:
            return swizzle
    raise AssertionError(f"no swizzle for copies of {rows} rows of {head_dim}")


class Ring:
    """Which copies are issued when, and how to wait for them; ``scratch`` is that of ``ring_scratch``."""

    def __init__(self, shape: TileShape, refs: KernelRefs, item: Item, scratch: Sequence[Any]) -> None:
        self.shape, self.item, self.pool, self.head = shape, item, refs.pool, refs.head
        self.keys, self.values, *self.barriers = scratch
        self.ids: Callable[[Any], list[Any]] = partial(block_ids, shape, refs.tables, refs.base[0], item)

    def slot(self, step: Any) -> Any:
        """The buffer of a step."""
        return lax.rem(step, jnp.int32(self.shape.config.stages))

    def issue(self, step: Any, ids: list[Any]) -> None:
        """Starts the copies of a step. Past the last one: none, or with cp.async, whose groups are counted, again."""
        if not self.shape.has_tma:
            self._copy(jnp.minimum(step, self.item.steps - 1), self.slot(step), ids)
            return

        @pl.when(step < self.item.steps)
        def _() -> None:
            self._copy(step, self.slot(step), ids)

    def _copy(self, step: Any, slot: Any, ids: list[Any]) -> None:
        shape = self.shape
        rows = pl.ds(first_key_in_block(shape, self.item, step), shape.copy_rows)

        def copy_all() -> None:
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

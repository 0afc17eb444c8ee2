"""Copies of tiles between places of global memory, inside a Mosaic GPU kernel: what all moves of the pool do.

A thread block here is one warpgroup that loads a handful of tiles, all at once, and then stores them. Nothing is
computed, so what counts is the number of bytes under way, and that comes from many such blocks on a multiprocessor
rather than from a ring inside one. Of blocks with a tile of K and one of V of ``MAX_TILE_BYTES`` six fit an H200 and
three an RTX PRO 6000 (shared memory), seven an A100 (72 registers a thread): 192, 96 and 224 KiB under way. By
Little's law they need some 40, 10 and 20 KiB on each multiprocessor (4.8, 1.8 and 2.0 TB/s over 132, 188 and 108 of
them, about one microsecond from request to data).

There are two ways through the chip, and both give the same bytes:

* TMA (compute capability 9.0 and newer): GMEM -> SMEM -> GMEM by the tensor memory accelerator. One thread issues
  the copies, no register holds data, all loads of a block arrive on one barrier. The stores are waited for only
  until they have read shared memory; the end of the kernel makes them visible.
* Registers (any GPU): each thread holds its share of every tile, in vectors of up to 16 bytes. Before 9.0 no
  hardware stores a tile by itself, so that staging in shared memory would gain nothing.

Numerics: bytes are moved as they are; NaN payloads and signed zeros survive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import (
    INTERPRETED,
    GpuTarget,
    gpu_target,
    store_global,
    unsupported_device_reason,
)

# A thread block moves one tile of K and one of V, or several that are as large together.
MAX_TILE_BYTES = 16384

# Elements of a TMA box in each dimension: CUDA driver API, cuTensorMapEncodeTiled, "boxDim".
MAX_BOX = 256

_DTYPES = ("bfloat16", "float16", "float32")
_WARP, _WARPGROUP = 32, 128


def unsupported_reason(kv_pool: KVPool, target: GpuTarget | None) -> str | None:
    """Why the kernels cannot move this pool's tiles on ``target``, or None."""
    head_dim, dtype = kv_pool.head_dim, kv_pool.k.dtype
    if kv_pool.format is None and dtype.name not in _DTYPES:
        return f"kv_pool.k.dtype={dtype} is none of {', '.join(_DTYPES)}, and not of a quantised pool"
    if head_dim % _WARP or head_dim > MAX_BOX:
        return f"head_dim={head_dim} is no multiple of {_WARP} up to {MAX_BOX}"
    return unsupported_device_reason(target)


def supported_target(operation: str, kv_pool: KVPool, target: GpuTarget | None, interpret: Any) -> GpuTarget:
    """``target``, or what it stands for if None: the interpreter's or the default device's.

    Raises:
      NotImplementedError: the kernels of ``operation`` cannot run there; says why.
    """
    target = target or (gpu_target() if interpret is None else INTERPRETED)
    reason = unsupported_reason(kv_pool, target)
    if reason or target is None:
        raise NotImplementedError(f"{operation}: implementation='mosaic_gpu': {reason}")
    return target


def rows_per_tile(num_rows: int, row_bytes: int) -> int:
    """The most rows that divide ``num_rows``, fit one TMA box and have at most ``MAX_TILE_BYTES``."""
    most = max(1, min(num_rows, MAX_BOX, MAX_TILE_BYTES // row_bytes))
    return max(rows for rows in range(1, most + 1) if num_rows % rows == 0)


@dataclass(frozen=True)
class TileCopy:
    """Copies ``count`` tiles of one shape at a time.

    Attributes:
      count: how many.
      shape: ``(rows, D)``.
      dtype: of their elements.
      tma: through shared memory by TMA; else through registers.
    """

    count: int
    shape: tuple[int, int]
    dtype: jnp.dtype
    tma: bool

    @property
    def scratch_types(self) -> list[Any]:
        """What the kernel must ask for. A tile is an allocation of its own: TMA wants 128-byte alignment."""
        if not self.tma:
            return []
        tiles = [plgpu.SMEM(self.shape, self.dtype) for _ in range(self.count)]
        return [*tiles, plgpu.Barrier(num_arrivals=self.count)]

    def __call__(
        self, sources: Sequence[Any], find_targets: Callable[[], Sequence[Any]], scratch: Sequence[Any]
    ) -> None:
        """Loads all tiles, then stores them.

        Args:
          sources: references to ``count`` tiles of global memory.
          find_targets: gives ``(reference, bool)`` for each: where it goes, and whether it does (None: always).
            Called when the loads are under way, so that what it reads to find out adds no latency. (Through
            registers the compiler puts the first tiles' loads after it, and skips them where nothing is stored.)
          scratch: references of ``scratch_types``.
        """
        if not self.tma:
            values = [plgpu.load(source, layout=self._layout, optimized=False) for source in sources]
            for value, (target, wanted) in zip(values, find_targets(), strict=True):
                _run_if(wanted, partial(store_global, target, value))
            return
        *tiles, arrived = scratch
        for source, tile in zip(sources, tiles, strict=True):
            plgpu.copy_gmem_to_smem(source, tile, arrived)
        targets = find_targets()
        plgpu.barrier_wait(arrived)
        for tile, (target, wanted) in zip(tiles, targets, strict=True):
            _run_if(wanted, partial(plgpu.copy_smem_to_gmem, tile, target))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    @property
    def _layout(self) -> Any:
        """How a warpgroup shares a tile: in vectors as long as possible, which may not cross the end of a row."""
        for size in (16, 8, 4, 2, 1):
            fits = size * self.dtype.itemsize <= 16 and self.shape[1] % size == 0
            if fits and prod(self.shape) % (size * _WARPGROUP) == 0:
                return plgpu.Layout.WG_STRIDED(self.shape, vec_size=size)
        # Too small for a warpgroup, such as one head with D of 32, 64 or 96.
        return rows_layout(*self.shape, 16 // self.dtype.itemsize)


def rows_layout(rows: int, width: int, longest: int) -> Any:
    """How a warpgroup shares a tile ``[rows, width]`` of rows that each lie in one warp.

    A lane holds vectors of up to ``longest`` elements, of fewer where a warp would lack rows for all of its lanes.
    Lanes and warps for which there is nothing even then do what others do.
    """
    of_width, of_rows = width & -width, rows & -rows  # the largest powers of two that divide them
    vector = min(longest, of_width)
    lanes = min(_WARP, of_width // vector)
    while vector > 1 and lanes < _WARP and lanes * of_rows < 4 * _WARP:
        vector, lanes = vector // 2, lanes * 2
    row_lanes = min(_WARP // lanes, of_rows)
    warps = min(4, of_rows // row_lanes)
    # Dimensions of a tile, from the last: within a vector, lanes of a row, rows of a warp, 1, warps; those of one are
    # left out, as Mosaic wants it.
    tiles: list[tuple[int, ...]] = [(warps * row_lanes, lanes * vector)]
    row_dim = -3 if lanes > 1 else -2
    if warps > 1 and row_lanes > 1:
        tiles.append((row_lanes, lanes * vector))
    if lanes > 1:
        tiles.append((vector,))
    row_lane_dims = (row_dim,) if row_lanes > 1 else ()
    warp_dims = (row_dim - 2 if row_lanes > 1 else row_dim,) if warps > 1 else ()
    return plgpu.Layout.TILED(
        plgpu.Tiling(tuple(tiles)),
        warp_dims=(*warp_dims, *_copies(4 // warps)),
        lane_dims=(*row_lane_dims, *((-2,) if lanes > 1 else ()), *_copies(_WARP // (lanes * row_lanes))),
        vector_dim=-1,
    )


def _copies(count: int) -> tuple[Any, ...]:
    return (plgpu.Replicated(count),) if count > 1 else ()


def divide(value: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Quotient and remainder, int32, of what is not negative: ``//`` and ``%`` would correct the sign."""
    return lax.div(value, jnp.int32(divisor)), lax.rem(value, jnp.int32(divisor))


def _run_if(wanted: jax.Array | None, store: Callable[[], None]) -> None:
    if wanted is None:
        store()
    else:
        pl.when(wanted)(store)

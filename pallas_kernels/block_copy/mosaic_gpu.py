"""Block moves as Mosaic GPU kernels: gather and scatter of whole blocks, K and V in one launch.

Grid: ``(layers, blocks, tiles of a block)``. A thread block moves one tile of K and the same of V.

Memory layout: a block ``[Hkv, S, D]`` is contiguous in the pool and in the staging arrays ``[L, P, Hkv, S, D]``; seen
as rows of ``D`` elements it is cut into equal tiles of up to 16 KiB, each one box for TMA. How tiles travel is
told in ``tile_copy``.

Copies inside the pool go through a staging array, a gather and then a scatter: thread blocks run in any order, so
that a kernel which read and wrote the pool at once could not promise that all sources are read before any target
is written. That costs one more trip through memory for the few blocks of a step that copy on write, and ``P``
blocks of temporary memory, as much as XLA's own gather and scatter take.

Padding: the dummy block is read, and never written; ids that share it do not race.

Numerics: none; bytes move as they are. A cast to the pool's dtype happens before, in XLA.
"""

from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget, kernel
from jaxpaged.pallas_kernels.tile_copy import TileCopy, rows_per_tile, supported_target

_GRID_NAMES = ("layer", "entry", "tile")


def copy_blocks_mosaic_gpu(
    kv_pool: KVPool,
    sources: jax.Array,
    targets: jax.Array,
    *,
    tma: bool | None = None,
    interpret: Any = None,
    target: GpuTarget | None = None,
) -> KVPool:
    """Out of the pool, then into it; arguments as in ``copy_blocks``, the rest as in ``gather_blocks_mosaic_gpu``."""
    options: dict[str, Any] = {"tma": tma, "interpret": interpret, "target": target}
    k, v = gather_blocks_mosaic_gpu(kv_pool, sources, **options)
    return scatter_blocks_mosaic_gpu(kv_pool, targets, k, v, **options)


def gather_blocks_mosaic_gpu(
    kv_pool: KVPool,
    block_ids: jax.Array,
    *,
    tma: bool | None = None,
    interpret: Any = None,
    target: GpuTarget | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One kernel for K and V; arguments as in ``gather_blocks``.

    Args:
      tma: whether tiles go by TMA or through registers; None for TMA where the GPU has it.
      interpret: a ``plgpu.InterpretGPUParams`` to run in the interpreter, for tests.
      target: the GPU to trace for, if not the default device.

    Raises:
      NotImplementedError: the device, the pool's dtype or its head dimension is not supported.
    """
    target = supported_target("gather_blocks", kv_pool, target, interpret)
    copy, tiles = _tiles(kv_pool, target, tma)
    num_layers, num_blocks, num_ids = kv_pool.num_layers, kv_pool.num_blocks, block_ids.shape[0]
    staging = jax.ShapeDtypeStruct((num_layers * num_ids, tiles * copy.shape[0], copy.shape[1]), copy.dtype)

    def gather_blocks_kernel(pool_k: Any, pool_v: Any, ids: Any, k: Any, v: Any, *scratch: Any) -> None:
        layer, entry, rows = _place(copy)
        source = layer * num_blocks + ids[entry]
        place = layer * num_ids + entry

        def find_targets() -> list[Any]:
            return [(new.at[place, rows], None) for new in (k, v)]

        copy([pool.at[source, rows] for pool in (pool_k, pool_v)], find_targets, scratch)

    k, v = kernel(
        "gather_blocks",
        gather_blocks_kernel,
        out_type=[staging, staging],
        grid=(num_layers, num_ids, tiles),
        grid_names=_GRID_NAMES,
        scratch_types=copy.scratch_types,
        interpret=interpret,
    )(_rows(kv_pool.k), _rows(kv_pool.v), block_ids)
    shape = (num_layers, num_ids, *kv_pool.k.shape[1:])
    return k.reshape(shape), v.reshape(shape)


def scatter_blocks_mosaic_gpu(
    kv_pool: KVPool,
    block_ids: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    tma: bool | None = None,
    interpret: Any = None,
    target: GpuTarget | None = None,
) -> KVPool:
    """One kernel for K and V; arguments as in ``scatter_blocks``, the rest as in ``gather_blocks_mosaic_gpu``."""
    target = supported_target("scatter_blocks", kv_pool, target, interpret)
    copy, tiles = _tiles(kv_pool, target, tma)
    num_layers, num_blocks, num_ids = kv_pool.num_layers, kv_pool.num_blocks, block_ids.shape[0]

    def scatter_blocks_kernel(pool_k: Any, pool_v: Any, k: Any, v: Any, ids: Any, *scratch: Any) -> None:
        layer, entry, rows = _place(copy)
        place = layer * num_ids + entry

        def find_targets() -> list[Any]:
            block_id = ids[entry]
            return [(pool.at[layer * num_blocks + block_id, rows], block_id > 0) for pool in (pool_k, pool_v)]

        copy([new.at[place, rows] for new in (k, v)], find_targets, scratch)

    pools = jax.new_ref(_rows(kv_pool.k)), jax.new_ref(_rows(kv_pool.v))
    staging = (num_layers * num_ids, tiles * copy.shape[0], copy.shape[1])
    kernel(
        "scatter_blocks",
        scatter_blocks_kernel,
        grid=(num_layers, num_ids, tiles),
        grid_names=_GRID_NAMES,
        scratch_types=copy.scratch_types,
        interpret=interpret,
    )(*pools, k.astype(copy.dtype).reshape(staging), v.astype(copy.dtype).reshape(staging), block_ids)
    shape = kv_pool.k.shape
    return KVPool(
        jax.freeze(pools[0]).reshape(shape), jax.freeze(pools[1]).reshape(shape), kv_pool.num_layers
    )


def _tiles(kv_pool: KVPool, target: GpuTarget, tma: bool | None) -> tuple[TileCopy, int]:
    """How a thread block copies its tiles, and how many tiles a block of the pool has."""
    _, num_heads, block_size, head_dim = kv_pool.k.shape
    dtype = kv_pool.k.dtype
    rows = rows_per_tile(num_heads * block_size, head_dim * dtype.itemsize)
    copy = TileCopy(2, (rows, head_dim), dtype, target.has_tma if tma is None else tma)
    return copy, num_heads * block_size // rows


def _rows(pool: jax.Array) -> jax.Array:
    """``[L*N, Hkv*S, D]``, no copy."""
    return pool.reshape(pool.shape[0], -1, pool.shape[3])


def _place(copy: TileCopy) -> tuple[jax.Array, jax.Array, Any]:
    """Layer, entry of the id list, and rows of the block that this thread block moves."""
    layer, entry, tile = (lax.axis_index(name) for name in _GRID_NAMES)
    return layer, entry, pl.ds(tile * copy.shape[0], copy.shape[0])

"""Block moves as Mosaic GPU kernels: gather and scatter of whole blocks.

K and V go in one launch, their scales, if the pool is quantised, in another.

Grid: ``(layers, blocks, tiles of a block)``. A thread block moves one tile of K and the same of V.

Memory layout: a block ``[Hkv, S, D]`` is contiguous in the pool and in the staging arrays ``[L, P, Hkv, S, D]``; seen
as rows of ``D`` elements it is cut into equal tiles of up to 16 KiB, each one box for TMA. The scales of a block of a
quantised pool are ``[Hkv, S]``, rows of ``S``. How tiles travel is told in ``tile_copy``.

Copies inside the pool go through a staging array, a gather and then a scatter: thread blocks run in any order, so
that a kernel which read and wrote the pool at once could not promise that all sources are read before any target
is written. That costs one more trip through memory for the few blocks of a step that copy on write, and ``P``
blocks of temporary memory, as much as XLA's own gather and scatter take.

Padding: the dummy block is read, and never written; ids that share it do not race.

Numerics: none; bytes move as they are. A cast to the pool's dtype happens before, in XLA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget, kernel
from jaxpaged.pallas_kernels.tile_copy import (
    MAX_BOX,
    TileCopy,
    rows_per_tile,
    supported_target,
)

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
    contents = gather_blocks_mosaic_gpu(kv_pool, sources, **options)
    return scatter_blocks_mosaic_gpu(kv_pool, targets, *contents, **options)


def gather_blocks_mosaic_gpu(
    kv_pool: KVPool,
    block_ids: jax.Array,
    *,
    tma: bool | None = None,
    interpret: Any = None,
    target: GpuTarget | None = None,
) -> tuple[jax.Array, ...]:
    """One kernel for K and V, one for their scales; arguments as in ``gather_blocks``.

    Args:
      tma: whether tiles go by TMA or through registers; None for TMA where the GPU has it.
      interpret: a ``plgpu.InterpretGPUParams`` to run in the interpreter, for tests.
      target: the GPU to trace for, if not the default device.

    Raises:
      NotImplementedError: the device, the pool's dtype or its head dimension is not supported.
    """
    target = supported_target("gather_blocks", kv_pool, target, interpret)
    gathered: tuple[jax.Array, ...] = ()
    for pair in _pairs(kv_pool.arrays):
        moves = _PairMoves.of(pair[0], kv_pool.num_layers, target.has_tma if tma is None else tma, interpret)
        gathered += moves.gather(pair, block_ids)
    return gathered


def scatter_blocks_mosaic_gpu(
    kv_pool: KVPool,
    block_ids: jax.Array,
    *contents: jax.Array,
    tma: bool | None = None,
    interpret: Any = None,
    target: GpuTarget | None = None,
) -> KVPool:
    """As many kernels; arguments as in ``scatter_blocks``, the rest as in ``gather_blocks_mosaic_gpu``."""
    target = supported_target("scatter_blocks", kv_pool, target, interpret)
    written: list[jax.Array] = []
    for pair, new in zip(_pairs(kv_pool.arrays), _pairs(contents), strict=True):
        moves = _PairMoves.of(pair[0], kv_pool.num_layers, target.has_tma if tma is None else tma, interpret)
        written += moves.scatter(pair, block_ids, new)
    return kv_pool.with_arrays(written)


@dataclass(frozen=True)
class _PairMoves:
    """Moves of the blocks of two arrays of one shape and dtype.

    Attributes:
      content: what they hold, for the kernel's name.
      copy: what a thread block does.
      tiles: of a block.
      num_layers: L.
      interpret: a ``plgpu.InterpretGPUParams``, or None.
    """

    content: str
    copy: TileCopy
    tiles: int
    num_layers: int
    interpret: Any

    @classmethod
    def of(cls, array: jax.Array, num_layers: int, tma: bool, interpret: Any) -> "_PairMoves":
        """For arrays like this one, ``[L*N, Hkv, S, ...]``."""
        num_rows, width = _rows_of_block(array)
        row_bytes = width * array.dtype.itemsize
        rows = rows_per_tile(num_rows, row_bytes)
        # TMA's rows are multiples of 16 bytes: CUDA driver API, cuTensorMapEncodeTiled, "globalStrides".
        copy = TileCopy(2, (rows, width), array.dtype, tma and row_bytes % 16 == 0)
        return cls("blocks" if array.ndim == 4 else "scales", copy, num_rows // rows, num_layers, interpret)

    def gather(self, pools: Sequence[jax.Array], block_ids: jax.Array) -> tuple[jax.Array, ...]:
        """Each ``[L, P, Hkv, S, ...]``."""
        num_blocks, num_ids = pools[0].shape[0] // self.num_layers, block_ids.shape[0]

        def gather_kernel(pool_k: Any, pool_v: Any, ids: Any, k: Any, v: Any, *scratch: Any) -> None:
            layer, entry, rows = self._place()
            source = layer * num_blocks + ids[entry]
            place = layer * num_ids + entry

            def find_targets() -> list[Any]:
                return [(new.at[place, rows], None) for new in (k, v)]

            self.copy([pool.at[source, rows] for pool in (pool_k, pool_v)], find_targets, scratch)

        staging = jax.ShapeDtypeStruct(self._staging(num_ids), self.copy.dtype)
        launch = self._kernel("gather", gather_kernel, num_ids, out_type=[staging, staging])
        shape = (self.num_layers, num_ids, *pools[0].shape[1:])
        return tuple(new.reshape(shape) for new in launch(*map(_rows, pools), block_ids))

    def scatter(
        self, pools: Sequence[jax.Array], block_ids: jax.Array, contents: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """The pools after the writes."""
        num_blocks, num_ids = pools[0].shape[0] // self.num_layers, block_ids.shape[0]

        def scatter_kernel(pool_k: Any, pool_v: Any, k: Any, v: Any, ids: Any, *scratch: Any) -> None:
            layer, entry, rows = self._place()
            place = layer * num_ids + entry

            def find_targets() -> list[Any]:
                block_id = ids[entry]
                block = layer * num_blocks + block_id
                return [(pool.at[block, rows], block_id > 0) for pool in (pool_k, pool_v)]

            self.copy([new.at[place, rows] for new in (k, v)], find_targets, scratch)

        refs = [jax.new_ref(_rows(pool)) for pool in pools]
        staged = [new.astype(self.copy.dtype).reshape(self._staging(num_ids)) for new in contents]
        self._kernel("scatter", scatter_kernel, num_ids)(*refs, *staged, block_ids)
        return [jax.freeze(ref).reshape(pool.shape) for ref, pool in zip(refs, pools, strict=True)]

    def _kernel(self, name: str, body: Any, num_ids: int, **options: Any) -> Any:
        return kernel(
            f"{name}_{self.content}",
            body,
            grid=(self.num_layers, num_ids, self.tiles),
            grid_names=_GRID_NAMES,
            scratch_types=self.copy.scratch_types,
            interpret=self.interpret,
            **options,
        )

    def _staging(self, num_ids: int) -> tuple[int, int, int]:
        """The shape of the blocks outside of the pool."""
        return self.num_layers * num_ids, self.tiles * self.copy.shape[0], self.copy.shape[1]

    def _place(self) -> tuple[jax.Array, jax.Array, Any]:
        """Layer, entry of the id list, and rows of the block that this thread block moves."""
        layer, entry, tile = (lax.axis_index(name) for name in _GRID_NAMES)
        return layer, entry, pl.ds(tile * self.copy.shape[0], self.copy.shape[0])


def _pairs(arrays: Sequence[jax.Array]) -> list[Sequence[jax.Array]]:
    """Keys and values, then their scales if there are any."""
    return [arrays[i : i + 2] for i in range(0, len(arrays), 2)]


def _rows_of_block(array: jax.Array) -> tuple[int, int]:
    """How many rows a block has, and elements a row: as many as one box may have."""
    _, num_heads, block_size, *head_dim = array.shape
    if head_dim:
        return num_heads * block_size, head_dim[0]
    width = max(width for width in range(1, MAX_BOX + 1) if block_size % width == 0)
    return num_heads * block_size // width, width


def _rows(array: jax.Array) -> jax.Array:
    """``[L*N, rows, width]``, no copy."""
    return array.reshape(array.shape[0], *_rows_of_block(array))

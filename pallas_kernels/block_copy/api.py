"""Block moves, over all layers at once: copies for copy-on-write, swapping out to the host and in again.

Blocks are moved as they are, codes and scales of a quantised pool too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from jaxpaged.pallas_kernels.batch import KVPool, MixedKVPool
from jaxpaged.pallas_kernels.block_copy import reference, xla
from jaxpaged.pallas_kernels.pool_moves import best_implementation


class BlockMoves(NamedTuple):
    """One implementation of the three operations."""

    copy: Callable[[KVPool, jax.Array, jax.Array], KVPool]
    gather: Callable[[KVPool, jax.Array], tuple[jax.Array, ...]]
    scatter: Callable[..., KVPool]


# The kernels are imported where they are used: Mosaic GPU takes a quarter of a second to load.
def _copy_mosaic_gpu(kv_pool: KVPool, sources: jax.Array, targets: jax.Array) -> KVPool:
    from jaxpaged.pallas_kernels.block_copy.mosaic_gpu import copy_blocks_mosaic_gpu

    return copy_blocks_mosaic_gpu(kv_pool, sources, targets)


def _gather_mosaic_gpu(kv_pool: KVPool, block_ids: jax.Array) -> tuple[jax.Array, ...]:
    from jaxpaged.pallas_kernels.block_copy.mosaic_gpu import gather_blocks_mosaic_gpu

    return gather_blocks_mosaic_gpu(kv_pool, block_ids)


def _scatter_mosaic_gpu(kv_pool: KVPool, block_ids: jax.Array, *contents: jax.Array) -> KVPool:
    from jaxpaged.pallas_kernels.block_copy.mosaic_gpu import scatter_blocks_mosaic_gpu

    return scatter_blocks_mosaic_gpu(kv_pool, block_ids, *contents)


IMPLEMENTATIONS: dict[str, BlockMoves] = {
    "reference": BlockMoves(
        reference.copy_blocks_reference, reference.gather_blocks_reference, reference.scatter_blocks_reference
    ),
    "xla": BlockMoves(xla.copy_blocks_xla, xla.gather_blocks_xla, xla.scatter_blocks_xla),
    "mosaic_gpu": BlockMoves(_copy_mosaic_gpu, _gather_mosaic_gpu, _scatter_mosaic_gpu),
}


def copy_blocks[Pool: (KVPool, MixedKVPool)](
    kv_pool: Pool, sources: jax.Array, targets: jax.Array, *, implementation: str | None = None
) -> Pool:
    """Copies whole blocks inside the pool, in every layer; in place when the pool is donated.

    All sources are read before any target is written, so that chains and swaps do what they say.

    Args:
      kv_pool: see ``KVPool`` and ``MixedKVPool``.
      sources, targets: int32 ``[P]``, block ids; pad with 0 (the dummy block onto itself). Targets other than
        0 are distinct.
      implementation: ``"reference"`` (outside of jit only), ``"xla"``, ``"mosaic_gpu"``, or None for the best one
        here.

    Returns:
      The pool after the copies; what the dummy block holds is up to the implementation.

    Raises:
      ValueError: shapes that differ, an unknown implementation.
      NotImplementedError: a named implementation cannot take this call; it says why and never falls back.
    """
    if sources.ndim != 1 or sources.shape != targets.shape:
        raise ValueError(
            f"copy_blocks: sources.shape={sources.shape}, targets.shape={targets.shape} must be one [P]"
        )
    copied: list[jax.Array] = []
    for part in kv_pool.parts:
        copied += _moves("copy_blocks", part, implementation).copy(part, sources, targets).arrays
    return kv_pool.with_arrays(copied)


def gather_blocks(
    kv_pool: KVPool | MixedKVPool, block_ids: jax.Array, *, implementation: str | None = None
) -> tuple[jax.Array, ...]:
    """Copies whole blocks of every layer out of the pool, into contiguous arrays to send to the host.

    Args:
      kv_pool: see ``KVPool`` and ``MixedKVPool``.
      block_ids: int32 ``[P]``; pad with 0, the dummy block.
      implementation: as in ``copy_blocks``.

    Returns:
      For each of ``kv_pool.arrays``, ``[L*N, Hkv, S, ...]``, one of its dtype, ``[L, P, Hkv, S, ...]``: of an ordinary
      pool k and v.

    Raises:
      ValueError: ``block_ids`` is no vector, an unknown implementation.
      NotImplementedError: a named implementation cannot take this call; it says why and never falls back.
    """
    if block_ids.ndim != 1:
        raise ValueError(f"gather_blocks: block_ids.shape={block_ids.shape} must be [P]")
    gathered: tuple[jax.Array, ...] = ()
    for part in kv_pool.parts:
        gathered += _moves("gather_blocks", part, implementation).gather(part, block_ids)
    return gathered


def scatter_blocks[Pool: (KVPool, MixedKVPool)](
    kv_pool: Pool, block_ids: jax.Array, *contents: jax.Array, implementation: str | None = None
) -> Pool:
    """Writes whole blocks of every layer into the pool: the inverse of ``gather_blocks``.

    In place when the pool is donated.

    Args:
      kv_pool: see ``KVPool`` and ``MixedKVPool``.
      block_ids: int32 ``[P]``, where they go; pad with 0, the dummy block. Those other than 0 are distinct.
      *contents: what ``gather_blocks`` returns of such a pool, each cast to the dtype of the pool's array.
      implementation: as in ``copy_blocks``.

    Returns:
      The pool after the writes; what the dummy block holds is up to the implementation.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
      NotImplementedError: a named implementation cannot take this call; it says why and never falls back.
    """
    shapes, blocks = [new.shape for new in contents], _contents_shapes(kv_pool.parts, block_ids)
    if block_ids.ndim != 1 or shapes != blocks:
        raise ValueError(
            f"scatter_blocks: block_ids.shape={block_ids.shape} must be [P], and the shapes of contents, {shapes}, for "
            f"each array of the pool [L, P, Hkv, S, ...]: {blocks}"
        )
    written: list[jax.Array] = []
    for part in kv_pool.parts:
        mine, contents = contents[: len(part.arrays)], contents[len(part.arrays) :]
        written += _moves("scatter_blocks", part, implementation).scatter(part, block_ids, *mine).arrays
    return kv_pool.with_arrays(written)


def _contents_shapes(parts: Sequence[KVPool], block_ids: jax.Array) -> list[tuple[int, ...]]:
    return [(part.num_layers, *block_ids.shape, *array.shape[1:]) for part in parts for array in part.arrays]


def _moves(operation: str, kv_pool: KVPool, implementation: str | None) -> BlockMoves:
    if implementation is None:
        implementation = best_implementation(operation, kv_pool)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: implementation={implementation!r} is none of {sorted(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation]

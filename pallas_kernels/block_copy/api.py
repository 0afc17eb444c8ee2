"""Block moves, over all layers at once: copies for copy-on-write, swapping out to the host and in again."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxpaged.pallas_kernels.batch import KVPool
from jaxpaged.pallas_kernels.block_copy import reference, xla
from jaxpaged.pallas_kernels.pool_moves import best_implementation


class BlockMoves(NamedTuple):
    """One implementation of the three operations."""

    copy: Callable[[KVPool, jax.Array, jax.Array], KVPool]
    gather: Callable[[KVPool, jax.Array], tuple[jax.Array, jax.Array]]
    scatter: Callable[[KVPool, jax.Array, jax.Array, jax.Array], KVPool]


# The kernels are imported where they are used: Mosaic GPU takes a quarter of a second to load.
def _copy_mosaic_gpu(kv_pool: KVPool, sources: jax.Array, targets: jax.Array) -> KVPool:
    from jaxpaged.pallas_kernels.block_copy.mosaic_gpu import copy_blocks_mosaic_gpu

    return copy_blocks_mosaic_gpu(kv_pool, sources, targets)


def _gather_mosaic_gpu(kv_pool: KVPool, block_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    from jaxpaged.pallas_kernels.block_copy.mosaic_gpu import gather_blocks_mosaic_gpu

    return gather_blocks_mosaic_gpu(kv_pool, block_ids)


def _scatter_mosaic_gpu(kv_pool: KVPool, block_ids: jax.Array, k: jax.Array, v: jax.Array) -> KVPool:
    from jaxpaged.pallas_kernels.block_copy.mosaic_gpu import scatter_blocks_mosaic_gpu

    return scatter_blocks_mosaic_gpu(kv_pool, block_ids, k, v)


IMPLEMENTATIONS: dict[str, BlockMoves] = {
    "reference": BlockMoves(
        reference.copy_blocks_reference, reference.gather_blocks_reference, reference.scatter_blocks_reference
    ),
    "xla": BlockMoves(xla.copy_blocks_xla, xla.gather_blocks_xla, xla.scatter_blocks_xla),
    "mosaic_gpu": BlockMoves(_copy_mosaic_gpu, _gather_mosaic_gpu, _scatter_mosaic_gpu),
}


def copy_blocks(
    kv_pool: KVPool, sources: jax.Array, targets: jax.Array, *, implementation: str | None = None
) -> KVPool:
    """Copies whole blocks inside the pool, in every layer; in place when the pool is donated.

    All sources are read before any target is written, so that chains and swaps do what they say.

    Args:
      kv_pool: see ``KVPool``.
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
    return _moves("copy_blocks", kv_pool, implementation).copy(kv_pool, sources, targets)


def gather_blocks(
    kv_pool: KVPool, block_ids: jax.Array, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Copies whole blocks of every layer out of the pool, into two contiguous arrays to send to the host.

    Args:
      kv_pool: see ``KVPool``.
      block_ids: int32 ``[P]``; pad with 0, the dummy block.
      implementation: as in ``copy_blocks``.

    Returns:
      k, v: ``[L, P, Hkv, S, D]`` in the pool's dtype.

    Raises:
      ValueError: ``block_ids`` is no vector, an unknown implementation.
      NotImplementedError: a named implementation cannot take this call; it says why and never falls back.
    """
    if block_ids.ndim != 1:
        raise ValueError(f"gather_blocks: block_ids.shape={block_ids.shape} must be [P]")
    return _moves("gather_blocks", kv_pool, implementation).gather(kv_pool, block_ids)


def scatter_blocks(
    kv_pool: KVPool, block_ids: jax.Array, k: jax.Array, v: jax.Array, *, implementation: str | None = None
) -> KVPool:
    """Writes whole blocks of every layer into the pool: the inverse of ``gather_blocks``.

    In place when the pool is donated.

    Args:
      kv_pool: see ``KVPool``.
      block_ids: int32 ``[P]``, where they go; pad with 0, the dummy block. Those other than 0 are distinct.
      k, v: ``[L, P, Hkv, S, D]``, cast to the pool's dtype.
      implementation: as in ``copy_blocks``.

    Returns:
      The pool after the writes; what the dummy block holds is up to the implementation.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation.
      NotImplementedError: a named implementation cannot take this call; it says why and never falls back.
    """
    blocks = (kv_pool.num_layers, *block_ids.shape, *kv_pool.k.shape[1:])
    if block_ids.ndim != 1 or k.shape != blocks or v.shape != blocks:
        raise ValueError(
            f"scatter_blocks: block_ids.shape={block_ids.shape}, k.shape={k.shape}, v.shape={v.shape} must be [P] "
            f"and twice [L, P, Hkv, S, D] of kv_pool.k.shape={kv_pool.k.shape}, L={kv_pool.num_layers}"
        )
    return _moves("scatter_blocks", kv_pool, implementation).scatter(kv_pool, block_ids, k, v)


def _moves(operation: str, kv_pool: KVPool, implementation: str | None) -> BlockMoves:
    if implementation is None:
        implementation = best_implementation(operation, kv_pool)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{operation}: implementation={implementation!r} is none of {sorted(IMPLEMENTATIONS)}"
        )
    return IMPLEMENTATIONS[implementation]

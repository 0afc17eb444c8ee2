"""Pools of random numbers, and what writing to them means in plain numpy: shares nothing with the package."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.pallas_kernels import KVPool


def random_pool(
    *,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: str = "float32",
) -> KVPool:
    rng = np.random.default_rng(0)
    shape = (num_layers * num_blocks, num_kv_heads, block_size, head_dim)
    return KVPool(*(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2)), num_layers)


def random_pair(shape: tuple[int, ...], dtype: str = "float32") -> tuple[jax.Array, jax.Array]:
    """New keys and values."""
    rng = np.random.default_rng(1)
    k, v = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    return k, v


def distinct_slots(pool: KVPool, count: int, num_padding: int = 0) -> np.ndarray:
    """int32 ``[count + num_padding]``: slots outside the dummy block in random order, then padding."""
    rng = np.random.default_rng(count)
    slots = pool.block_size + rng.permutation((pool.num_blocks - 1) * pool.block_size)[:count]
    return np.concatenate([slots, np.zeros(num_padding)]).astype(np.int32)


def after_scatter(
    pool: KVPool, k: jax.Array, v: jax.Array, layer: int, slots: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pool's arrays once tokens are written to their slots."""
    arrays = np.array(pool.k), np.array(pool.v)
    for array, new in zip(arrays, (k, v), strict=True):
        for token, slot in enumerate(slots):
            block, offset = divmod(int(slot), pool.block_size)
            array[layer * pool.num_blocks + block, :, offset] = np.asarray(new)[token].astype(array.dtype)
    return arrays


def after_block_writes(
    pool: KVPool, block_ids: Sequence[int], k: np.ndarray | jax.Array, v: np.ndarray | jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """The pool's arrays once whole blocks ``[L, P, Hkv, S, D]`` are written."""
    arrays = np.array(pool.k), np.array(pool.v)
    for array, new in zip(arrays, (k, v), strict=True):
        for layer in range(pool.num_layers):
            for i, block_id in enumerate(block_ids):
                array[layer * pool.num_blocks + block_id] = np.asarray(new)[layer, i].astype(array.dtype)
    return arrays


def blocks_of(pool: KVPool, block_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """``[L, P, Hkv, S, D]`` of keys and of values."""
    layers = [
        [layer * pool.num_blocks + block_id for block_id in block_ids] for layer in range(pool.num_layers)
    ]
    return np.asarray(pool.k)[np.array(layers)], np.asarray(pool.v)[np.array(layers)]


def check_equal(pool: KVPool, expected: tuple[np.ndarray, np.ndarray]) -> None:
    """Bit by bit, the dummy block of each layer excepted: what it holds is nobody's business."""
    for array, wanted in zip((pool.k, pool.v), expected, strict=True):
        real = np.arange(wanted.shape[0]) % pool.num_blocks > 0
        assert array.dtype == wanted.dtype
        assert np.asarray(array)[real].tobytes() == wanted[real].tobytes()


def changed_slots(before: KVPool, after: KVPool) -> set[tuple[int, int]]:
    """(block of the flat pool, offset) that differ, in keys or in values."""
    places = set()
    for one, other in ((before.k, after.k), (before.v, after.v)):
        differs = (np.asarray(one) != np.asarray(other)).any(axis=(1, 3))
        places |= {(int(block), int(offset)) for block, offset in np.argwhere(differs)}
    return places

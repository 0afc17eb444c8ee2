"""Pools of random numbers, and what writing to them means in plain numpy: shares nothing with the package."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.pallas_kernels import KVPool

# The largest code of each quantised format.
LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0, "int4": 7.0}
FP8 = jnp.dtype("float8_e4m3fn")


def random_pool(
    *,
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: str = "float32",
) -> KVPool:
    """``dtype`` may name a quantised format: any byte is a code then, NaN of fp8 among them."""
    rng = np.random.default_rng(0)
    vectors = num_layers * num_blocks, num_kv_heads, block_size
    if dtype not in LARGEST:
        k, v = (jnp.asarray(rng.standard_normal((*vectors, head_dim)), dtype) for _ in range(2))
        return KVPool(k, v, num_layers)
    storage = {"fp8_e4m3": FP8, "int8": np.int8, "int4": np.uint8}[dtype]
    width = head_dim // 2 if dtype == "int4" else head_dim
    codes = (rng.integers(0, 256, (*vectors, width), np.uint8).view(storage) for _ in range(2))
    scales = (jnp.asarray(rng.random(vectors), jnp.float32) for _ in range(2))
    return KVPool(*map(jnp.asarray, codes), num_layers, *scales)


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


def quantised(x: np.ndarray | jax.Array, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of vectors ``[..., D]``."""
    x, largest_code = np.asarray(x).astype(np.float32), np.float32(LARGEST[kind])
    largest = np.abs(x).max(axis=-1)
    scale = np.where(largest < 1e-30, np.float32(1), largest * np.float32(1 / LARGEST[kind]))
    scaled = np.clip(x * (np.float32(1) / scale)[..., None], -largest_code, largest_code)
    if kind == "fp8_e4m3":
        return scaled.astype(FP8), scale
    codes = np.rint(scaled).astype(np.int8)
    if kind == "int8":
        return codes, scale
    half = codes.shape[-1] // 2
    return ((codes[..., :half] & 15) | (codes[..., half:] << 4)).astype(np.uint8), scale


def contents_of(pool: KVPool, k: np.ndarray | jax.Array, v: np.ndarray | jax.Array) -> tuple[np.ndarray, ...]:
    """What k and v become in each of the pool's arrays."""
    if pool.format is None:
        return np.asarray(k).astype(pool.k.dtype), np.asarray(v).astype(pool.v.dtype)
    (k_codes, k_scale), (v_codes, v_scale) = (quantised(x, pool.format.name) for x in (k, v))
    return k_codes, v_codes, k_scale, v_scale


def after_scatter(
    pool: KVPool, k: jax.Array, v: jax.Array, layer: int, slots: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, ...]:
    """The pool's arrays once tokens are written to their slots."""
    arrays = tuple(map(np.array, pool.arrays))
    for array, new in zip(arrays, contents_of(pool, k, v), strict=True):
        for token, slot in enumerate(slots):
            block, offset = divmod(int(slot), pool.block_size)
            array[layer * pool.num_blocks + block, :, offset] = new[token]
    return arrays


def after_block_writes(
    pool: KVPool, block_ids: Sequence[int], *contents: np.ndarray | jax.Array
) -> tuple[np.ndarray, ...]:
    """The pool's arrays once whole blocks ``[L, P, Hkv, S, ...]`` are written."""
    arrays = tuple(map(np.array, pool.arrays))
    for array, new in zip(arrays, contents, strict=True):
        for layer in range(pool.num_layers):
            for i, block_id in enumerate(block_ids):
                array[layer * pool.num_blocks + block_id] = np.asarray(new)[layer, i].astype(array.dtype)
    return arrays


def blocks_of(pool: KVPool, block_ids: Sequence[int]) -> tuple[np.ndarray, ...]:
    """``[L, P, Hkv, S, ...]`` of each array."""
    layers = [
        [layer * pool.num_blocks + block_id for block_id in block_ids] for layer in range(pool.num_layers)
    ]
    return tuple(np.asarray(array)[np.array(layers)] for array in pool.arrays)


def check_equal(pool: KVPool, expected: Sequence[np.ndarray]) -> None:
    """Bit by bit, the dummy block of each layer excepted: what it holds is nobody's business."""
    for array, wanted in zip(pool.arrays, expected, strict=True):
        real = np.arange(wanted.shape[0]) % pool.num_blocks > 0
        assert array.dtype == wanted.dtype
        assert np.asarray(array)[real].tobytes() == wanted[real].tobytes()


def check_near(pool: KVPool, expected: Sequence[np.ndarray]) -> None:
    """As ``check_equal``, but a few codes may be the next ones: a GPU's reciprocal is not rounded to nearest."""
    codes, scales = (pool.k, pool.v), (pool.k_scale, pool.v_scale)
    real = np.arange(pool.k.shape[0]) % pool.num_blocks > 0
    for array, wanted in zip(codes, expected[:2], strict=True):
        difference = np.abs(_ordinals(np.asarray(array)[real]) - _ordinals(wanted[real]))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
    for array, wanted in zip(scales, expected[2:], strict=True):
        assert np.asarray(array)[real].tobytes() == wanted[real].tobytes()


def _ordinals(codes: np.ndarray) -> np.ndarray:
    """Codes as integers that grow by one from each to the next."""
    if codes.dtype == FP8:
        bits = codes.view(np.uint8).astype(np.int32)
        return np.where(bits < 128, bits, 128 - bits)
    if codes.dtype == np.uint8:
        signed = codes.view(np.int8)
        return np.stack([(signed << 4) >> 4, signed >> 4]).astype(np.int32)
    return codes.astype(np.int32)


def changed_slots(before: KVPool, after: KVPool) -> set[tuple[int, int]]:
    """(block of the flat pool, offset) that differ, in any array."""
    places = set()
    for one, other in zip(before.arrays, after.arrays, strict=True):
        differs = np.asarray(one).view(np.uint8) != np.asarray(other).view(np.uint8)
        differs = differs.reshape(*one.shape[:3], -1).any(axis=(1, 3))
        places |= {(int(block), int(offset)) for block, offset in np.argwhere(differs)}
    return places

"""Scatter and block moves on a GPU: bit for bit what plain JAX does, in place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import KVPool, cache_scatter, copy_blocks
from jaxpaged.pallas_kernels.block_copy import gather_blocks, scatter_blocks
from jaxpaged.pallas_kernels.quantisation import FORMATS, dequantise
from tests.pallas_kernels.pool_oracle import (
    after_block_writes,
    after_scatter,
    blocks_of,
    check_equal,
    check_near,
    distinct_slots,
    random_pair,
    random_pool,
)

pytestmark = pytest.mark.gpu

SHAPES = (
    {"num_layers": 3, "num_blocks": 40, "num_kv_heads": 8, "block_size": 16, "head_dim": 128},
    {"num_layers": 2, "num_blocks": 20, "num_kv_heads": 2, "block_size": 64, "head_dim": 64},
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 300])
def test_scatter(shape: dict[str, int], dtype: str, num_tokens: int) -> None:
    pool = random_pool(**shape, dtype=dtype)
    k, v = random_pair((num_tokens + 5, shape["num_kv_heads"], shape["head_dim"]), dtype)
    slots = distinct_slots(pool, num_tokens, 5)
    expected = after_scatter(pool, k, v, 1, slots)

    def write(pool: KVPool) -> KVPool:
        return cache_scatter(pool, k, v, 1, jnp.asarray(slots), implementation="mosaic_gpu")

    check_equal(jax.jit(write)(pool), expected)
    check_equal(jax.jit(write, donate_argnums=0)(pool), expected)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 300])
def test_scatter_quantises(shape: dict[str, int], kind: str, num_tokens: int, implementation: str) -> None:
    """Scales bit for bit; a code may be the next one where the GPU's reciprocal puts an element over the middle."""
    pool = random_pool(**shape, dtype=kind)
    k, v = random_pair((num_tokens + 5, shape["num_kv_heads"], shape["head_dim"]), "bfloat16")
    k, v = k.at[0, 0].set(0), v.at[0, 0].multiply(1e37)
    slots = distinct_slots(pool, num_tokens, 5)
    expected = after_scatter(pool, k, v, 1, slots)

    def write(pool: KVPool) -> KVPool:
        return cache_scatter(pool, k, v, 1, jnp.asarray(slots), implementation=implementation)

    check_near(jax.jit(write)(pool), expected)
    check_near(jax.jit(write, donate_argnums=0)(pool), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_vector_that_is_not_finite_reads_as_nan(kind: str) -> None:
    pool = random_pool(**SHAPES[0], dtype=kind)
    k, v = random_pair((1, 8, 128))
    k, v = k.at[0, 0, 7].set(jnp.nan), v.at[0, 0, 9].set(jnp.inf)
    written = cache_scatter(pool, k, v, 0, jnp.array([20], jnp.int32), implementation="mosaic_gpu")
    for array, scales in ((written.k, written.k_scale), (written.v, written.v_scale)):
        found = np.asarray(dequantise(array[1, :, 4], scales[1, :, 4]))
        assert np.isnan(found[0]).all()
        assert np.isfinite(found[1:]).all()


def test_a_donated_pool_keeps_its_memory() -> None:
    pool = KVPool.zeros(
        num_layers=2,
        num_blocks=64,
        num_kv_heads=4,
        block_size=16,
        head_dim=128,
        dtype=jnp.dtype("bfloat16"),
    )

    def write(pool: KVPool, k: jax.Array, slots: jax.Array) -> KVPool:
        for layer in range(2):
            pool = cache_scatter(pool, k, k, layer, slots, implementation="mosaic_gpu")
        return pool

    step = jax.jit(write, donate_argnums=0)
    places = {pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()}
    k = jnp.ones((8, 4, 128), jnp.bfloat16)
    for first in range(16, 21):
        pool = step(pool, k, jnp.arange(first, first + 8, dtype=jnp.int32))
        assert {pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()} == places


@pytest.mark.parametrize("dtype", ["bfloat16", *FORMATS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_blocks(shape: dict[str, int], dtype: str) -> None:
    pool = random_pool(**shape, dtype=dtype)
    ids = [3, 17, 1, 9]
    moves: dict[str, Any] = {"implementation": "mosaic_gpu"}
    gathered = gather_blocks(pool, jnp.array(ids, jnp.int32), **moves)
    for found, wanted in zip(gathered, blocks_of(pool, ids), strict=True):
        assert np.asarray(found).tobytes() == wanted.tobytes()
    targets = [5, 2, 12, 8]
    written = scatter_blocks(pool, jnp.array(targets, jnp.int32), *gathered, **moves)
    check_equal(written, after_block_writes(pool, targets, *gathered))
    # A swap and a chain: every source is read before any target is written.
    sources, targets = [1, 2, 4, 5], [2, 1, 5, 6]
    copied = copy_blocks(pool, jnp.array(sources, jnp.int32), jnp.array(targets, jnp.int32), **moves)
    check_equal(copied, after_block_writes(pool, targets, *blocks_of(pool, sources)))


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
def test_writes_past_two_to_the_31_elements(implementation: str) -> None:
    """The last block of 32,768, and nothing else."""
    num_blocks, size = 32_768, (8, 128, 128)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if memory < 2.2 * num_blocks * np.prod(size) * 2:
        pytest.skip(f"{memory / 2**30:.0f} GiB of memory, two arrays of 8 GiB needed")
    zeros = [jnp.zeros((num_blocks, *size), jnp.bfloat16) for _ in range(2)]
    k, v = random_pair((3, 8, 128), "bfloat16")
    slots = jnp.array([num_blocks * 128 - 1, num_blocks * 128 - 100, 5 * 128], jnp.int32)

    def write(pool: KVPool) -> KVPool:
        return cache_scatter(pool, k, v, 0, slots, implementation=implementation)

    pool = jax.jit(write, donate_argnums=0)(KVPool(*zeros, 1))
    del zeros
    for side, new in ((pool.k, k), (pool.v, v)):
        for token, slot in enumerate(slots.tolist()):
            np.testing.assert_array_equal(side[slot // 128, :, slot % 128], new[token])
        written = jax.jit(lambda x: (x != 0).any(axis=(1, 2, 3)).sum())(side)
        assert int(written) == 2  # blocks

"""Writing to the pool and copying blocks inside it: the right slots, in place."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import KVPool, cache_scatter, copy_blocks
from jaxpaged.pallas_kernels.cache_scatter import cache_scatter_reference

LAYERS, BLOCKS, HEADS, SIZE, DIM = 3, 6, 2, 4, 8
FLOAT32 = jnp.dtype("float32")


def random_pool(dtype: jnp.dtype = FLOAT32) -> KVPool:
    rng = np.random.default_rng(0)
    shape = (LAYERS * BLOCKS, HEADS, SIZE, DIM)
    return KVPool(*(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2)), LAYERS)


def random_tokens(count: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    k, v = (jnp.asarray(rng.standard_normal((count, HEADS, DIM)), jnp.float32) for _ in range(2))
    return k, v


def equal(one: KVPool, other: KVPool) -> None:
    np.testing.assert_array_equal(np.asarray(one.k, np.float32), np.asarray(other.k, np.float32))
    np.testing.assert_array_equal(np.asarray(one.v, np.float32), np.asarray(other.v, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_scatter_equals_token_by_token(layer: int, dtype: str) -> None:
    pool = random_pool(jnp.dtype(dtype))
    slots = jnp.asarray(np.random.default_rng(layer).permutation(BLOCKS * SIZE)[:9], jnp.int32)
    k, v = random_tokens(9)
    written = cache_scatter(pool, k, v, layer, slots)
    equal(written, cache_scatter_reference(pool, k, v, layer, slots))
    block, offset = int(slots[0]) // SIZE, int(slots[0]) % SIZE
    np.testing.assert_array_equal(written.k[layer * BLOCKS + block, :, offset], k[0].astype(dtype))
    np.testing.assert_array_equal(written.v[layer * BLOCKS + block, :, offset], v[0].astype(dtype))


def test_padding_touches_only_the_dummy_of_its_layer() -> None:
    pool = random_pool()
    k, v = random_tokens(7)
    slots = jnp.array([9, 13, 0, 0, 0, 0, 0], jnp.int32)
    written = cache_scatter(pool, k, v, 1, slots)
    for before, after in ((pool.k, written.k), (pool.v, written.v)):
        changed = np.argwhere((np.asarray(before) != np.asarray(after)).any(axis=(1, 3)))
        dummy = BLOCKS
        assert {tuple(place) for place in changed.tolist()} == {(dummy, 0), (BLOCKS + 2, 1), (BLOCKS + 3, 1)}


@pytest.mark.parametrize(
    ("k", "v", "slots"),
    [
        ((3, HEADS, DIM), (3, HEADS, DIM), (4,)),
        ((3, HEADS, DIM), (2, HEADS, DIM), (3,)),
        ((3, HEADS + 1, DIM), (3, HEADS + 1, DIM), (3,)),
        ((3, HEADS, DIM * 2), (3, HEADS, DIM * 2), (3,)),
    ],
)
def test_scatter_refuses_shapes(k: tuple[int, ...], v: tuple[int, ...], slots: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"cache_scatter: k\.shape="):
        cache_scatter(random_pool(), jnp.zeros(k), jnp.zeros(v), 0, jnp.zeros(slots, jnp.int32))


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_scatter_refuses_a_layer(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer={layer} is not in"):
        cache_scatter(random_pool(), *random_tokens(1), layer, jnp.zeros(1, jnp.int32))


def test_copy_moves_whole_blocks_in_every_layer() -> None:
    """A chain and a swap: all sources are read before any target is written. Padding does nothing."""
    pool = random_pool()
    pairs = [(1, 2), (2, 3), (4, 5), (5, 4), (0, 0), (0, 0)]
    sources, targets = (jnp.array(ids, jnp.int32) for ids in zip(*pairs, strict=True))
    copied = copy_blocks(pool, sources, targets)
    for before, after in ((pool.k, copied.k), (pool.v, copied.v)):
        expected = np.array(before)
        for layer in range(LAYERS):
            for source, target in pairs:
                expected[layer * BLOCKS + target] = np.asarray(before)[layer * BLOCKS + source]
        np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize(("sources", "targets"), [((2,), (3,)), ((2, 1), (2, 1)), ((), ())])
def test_copy_refuses_shapes(sources: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"copy_blocks: sources\.shape="):
        copy_blocks(random_pool(), jnp.zeros(sources, jnp.int32), jnp.zeros(targets, jnp.int32))


def scatter_all_layers(pool: KVPool, k: jax.Array, v: jax.Array, slots: jax.Array) -> KVPool:
    for layer in range(pool.num_layers):
        pool = cache_scatter(pool, k, v, layer, slots)
    return pool


def scatter_arguments() -> tuple[jax.ShapeDtypeStruct, ...]:
    tokens = jax.ShapeDtypeStruct((8, 4, 32), jnp.float32)
    return tokens, tokens, jax.ShapeDtypeStruct((8,), jnp.int32)


@pytest.mark.parametrize(
    ("function", "arguments", "moved"),
    [
        (scatter_all_layers, scatter_arguments(), 4 * 8 * 4 * 32),
        (copy_blocks, (jax.ShapeDtypeStruct((4,), jnp.int32),) * 2, 4 * 2 * 4 * 16 * 32),
    ],
    ids=["scatter", "copy"],
)
def test_a_donated_pool_is_changed_in_place(
    function: Callable[..., KVPool], arguments: tuple[jax.ShapeDtypeStruct, ...], moved: int
) -> None:
    """By XLA's account: the results are the arguments' memory, and what else there is, is of a step's size."""
    pool = jax.eval_shape(
        lambda: KVPool.zeros(
            num_layers=2, num_blocks=4096, num_kv_heads=4, block_size=16, head_dim=32, dtype=FLOAT32
        )
    )
    pool_bytes = 2 * 2 * 4096 * 4 * 16 * 32 * 4
    program = jax.jit(function, donate_argnums=0).lower(pool, *arguments).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    # Both arrays' elements that move, as float32, with their index arithmetic; a copy of the pool is 33 MB a time.
    assert memory.temp_size_in_bytes <= 16 * moved * 4
    assert memory.temp_size_in_bytes < pool_bytes // 50


def test_a_donated_pool_keeps_its_buffers() -> None:
    """The same, by the addresses of a pool that goes through many steps."""
    pool = KVPool.zeros(
        num_layers=2, num_blocks=64, num_kv_heads=4, block_size=16, head_dim=32, dtype=FLOAT32
    )
    step = jax.jit(scatter_all_layers, donate_argnums=0)
    addresses = {pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()}
    tokens = jnp.ones((8, 4, 32))
    for i in range(5):
        pool = step(pool, tokens, tokens, jnp.arange(16 + i, 24 + i, dtype=jnp.int32))
        assert {pool.k.unsafe_buffer_pointer(), pool.v.unsafe_buffer_pointer()} == addresses


def test_a_new_pool_is_zero() -> None:
    pool = KVPool.zeros(num_layers=2, num_blocks=3, num_kv_heads=1, block_size=4, head_dim=8, dtype=FLOAT32)
    assert pool.num_blocks == 3
    assert pool.block_size == 4
    assert not np.asarray(pool.k).any()
    assert not np.asarray(pool.v).any()

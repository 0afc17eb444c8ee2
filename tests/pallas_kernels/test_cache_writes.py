"""Writing to the pool and moving its blocks, in every implementation that runs here: the right slots, in place."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import (
    KVPool,
    MixedKVPool,
    cache_scatter,
    copy_blocks,
    gather_blocks,
    scatter_blocks,
)
from tests.pallas_kernels.pool_oracle import (
    after_block_writes,
    after_scatter,
    blocks_of,
    changed_slots,
    check_equal,
    distinct_slots,
    random_pair,
    random_pool,
)

LAYERS, BLOCKS, HEADS, SIZE, DIM = 3, 6, 2, 4, 8
FLOAT32 = jnp.dtype("float32")
HERE = ["reference", "xla", None]
DTYPES = ["float32", "bfloat16", "float16", "fp8_e4m3", "int8", "int4"]


def make_pool(dtype: str = "float32") -> KVPool:
    return random_pool(
        num_layers=LAYERS,
        num_blocks=BLOCKS,
        num_kv_heads=HEADS,
        block_size=SIZE,
        head_dim=DIM,
        dtype=dtype,
    )


def make_tokens(count: int) -> tuple[jax.Array, jax.Array]:
    return random_pair((count, HEADS, DIM))


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_scatter_writes_each_token_to_its_slot(layer: int, dtype: str, implementation: str | None) -> None:
    pool = make_pool(dtype)
    slots = distinct_slots(pool, 9)
    k, v = make_tokens(9)
    written = cache_scatter(pool, k, v, layer, jnp.asarray(slots), implementation=implementation)
    check_equal(written, after_scatter(pool, k, v, layer, slots))
    assert written.num_layers == LAYERS


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("dtype", ["float32", "int4"])
def test_padding_touches_only_the_dummy_of_its_layer(dtype: str, implementation: str | None) -> None:
    pool = make_pool(dtype)
    k, v = make_tokens(7)
    slots = jnp.array([9, 13, 0, 0, 0, 0, 0], jnp.int32)
    changed = changed_slots(pool, cache_scatter(pool, k, v, 1, slots, implementation=implementation))
    dummy = BLOCKS
    assert changed - {(dummy, 0)} == {(BLOCKS + 2, 1), (BLOCKS + 3, 1)}


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
        cache_scatter(make_pool(), jnp.zeros(k), jnp.zeros(v), 0, jnp.zeros(slots, jnp.int32))


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_scatter_refuses_a_layer(layer: int) -> None:
    with pytest.raises(ValueError, match=f"layer={layer} is not in"):
        cache_scatter(make_pool(), *make_tokens(1), layer, jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("implementation", HERE)
def test_copy_moves_whole_blocks_in_every_layer(implementation: str | None) -> None:
    """A chain and a swap: all sources are read before any target is written. Padding does nothing."""
    pool = make_pool()
    sources, targets = [1, 2, 4, 5, 0, 0], [2, 3, 5, 4, 0, 0]
    copied = copy_blocks(pool, jnp.array(sources), jnp.array(targets), implementation=implementation)
    check_equal(copied, after_block_writes(pool, targets, *blocks_of(pool, sources)))


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_blocks_are_those_asked_for(dtype: str, implementation: str | None) -> None:
    pool, block_ids = make_pool(dtype), [5, 1, 0, 4, 0]
    gathered = gather_blocks(pool, jnp.array(block_ids), implementation=implementation)
    for array, expected in zip(gathered, blocks_of(pool, block_ids), strict=True):
        assert array.dtype == expected.dtype
        assert np.asarray(array).tobytes() == expected.tobytes()


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scattered_blocks_replace_those_named(dtype: str, implementation: str | None) -> None:
    pool, block_ids = make_pool(dtype), [5, 1, 0, 4, 0]
    k, v = random_pair((LAYERS, len(block_ids), HEADS, SIZE, DIM), dtype)
    written = scatter_blocks(pool, jnp.array(block_ids), k, v, implementation=implementation)
    check_equal(written, after_block_writes(pool, block_ids, k, v))


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_e4m3", "int8", "int4"])
def test_blocks_that_go_out_come_back_to_other_places(dtype: str, implementation: str | None) -> None:
    pool, out_of, into = make_pool(dtype), [3, 1], [2, 5]
    emptied = pool.with_arrays([jnp.zeros_like(array) for array in pool.arrays])
    staged = gather_blocks(pool, jnp.array(out_of), implementation=implementation)
    back = scatter_blocks(emptied, jnp.array(into), *staged, implementation=implementation)
    check_equal(back, after_block_writes(emptied, into, *blocks_of(pool, out_of)))


def make_mixed_pool() -> MixedKVPool:
    """Five layers in four formats, the first of them in two."""
    dtypes = ["float32", "int8", "float32", "int4", "fp8_e4m3"]
    sizes = {"num_blocks": BLOCKS, "num_kv_heads": HEADS, "block_size": SIZE, "head_dim": DIM}
    zeros = MixedKVPool.zeros(dtypes=dtypes, **sizes)
    names = dict.fromkeys(dtypes)
    parts = [
        random_pool(num_layers=part.num_layers, dtype=name, **sizes)
        for part, name in zip(zeros.parts, names, strict=True)
    ]
    return zeros.with_arrays([array for part in parts for array in part.arrays])


@pytest.mark.parametrize("implementation", HERE)
def test_scatter_into_a_mixed_pool_is_that_into_the_layers_part(implementation: str | None) -> None:
    pool, (k, v) = make_mixed_pool(), make_tokens(3)
    slots = distinct_slots(pool.parts[0], 3)
    for layer in (1, 2, 3):
        written = cache_scatter(pool, k, v, layer, jnp.asarray(slots), implementation=implementation)
        place, index = pool.places[layer]
        for i, (before, after) in enumerate(zip(pool.parts, written.parts, strict=True)):
            new = after_scatter(before, k, v, index, slots) if i == place else map(np.asarray, before.arrays)
            check_equal(after, tuple(new))


@pytest.mark.parametrize("implementation", HERE)
def test_block_moves_of_a_mixed_pool_are_those_of_all_parts(implementation: str | None) -> None:
    pool, ids, into = make_mixed_pool(), [3, 1], [2, 5]
    gathered = gather_blocks(pool, jnp.array(ids), implementation=implementation)
    assert len(gathered) == 2 + 3 * 4
    written = scatter_blocks(pool, jnp.array(into), *gathered, implementation=implementation)
    copied = copy_blocks(pool, jnp.array(ids), jnp.array(into), implementation=implementation)
    for result in (written, copied):
        for before, after in zip(pool.parts, result.parts, strict=True):
            check_equal(after, after_block_writes(before, into, *blocks_of(before, ids)))


@pytest.mark.parametrize(("sources", "targets"), [((2,), (3,)), ((2, 1), (2, 1)), ((), ())])
def test_copy_refuses_shapes(sources: tuple[int, ...], targets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"copy_blocks: sources\.shape="):
        copy_blocks(make_pool(), jnp.zeros(sources, jnp.int32), jnp.zeros(targets, jnp.int32))


@pytest.mark.parametrize("shape", [(), (2, 1)])
def test_gather_refuses_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gather_blocks: block_ids\.shape="):
        gather_blocks(make_pool(), jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize(
    ("block_ids", "k", "v"),
    [
        ((2, 1), (LAYERS, 2, HEADS, SIZE, DIM), (LAYERS, 2, HEADS, SIZE, DIM)),
        ((3,), (LAYERS, 2, HEADS, SIZE, DIM), (LAYERS, 3, HEADS, SIZE, DIM)),
        ((3,), (LAYERS, 3, HEADS, SIZE, DIM), (LAYERS, 3, SIZE, HEADS, DIM)),
        ((3,), (LAYERS - 1, 3, HEADS, SIZE, DIM), (LAYERS - 1, 3, HEADS, SIZE, DIM)),
    ],
)
def test_block_scatter_refuses_shapes(
    block_ids: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"scatter_blocks: block_ids\.shape="):
        scatter_blocks(make_pool(), jnp.zeros(block_ids, jnp.int32), jnp.zeros(k), jnp.zeros(v))


def scatter_all_layers[Pool: (KVPool, MixedKVPool)](
    pool: Pool, k: jax.Array, v: jax.Array, slots: jax.Array
) -> Pool:
    for layer in range(pool.num_layers):
        pool = cache_scatter(pool, k, v, layer, slots)
    return pool


def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("function", "arguments", "moved"),
    [
        (scatter_all_layers, (array(8, 4, 32), array(8, 4, 32), array(8, dtype="int32")), 4 * 8 * 4 * 32),
        (copy_blocks, (array(4, dtype="int32"),) * 2, 4 * 2 * 4 * 16 * 32),
        (
            scatter_blocks,
            (array(4, dtype="int32"), array(2, 4, 4, 16, 32), array(2, 4, 4, 16, 32)),
            4 * 2 * 4 * 16 * 32,
        ),
    ],
    ids=["scatter", "copy", "scatter blocks"],
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


@pytest.mark.parametrize("moves", [False, True], ids=["scatter", "copy"])
@pytest.mark.parametrize("dtype", ["fp8_e4m3", "int8", "int4"])
def test_a_donated_quantised_pool_is_changed_in_place(dtype: str, moves: bool) -> None:
    """Layers of another format beside it; XLA's account, as above."""
    sizes = {"num_blocks": 4096, "num_kv_heads": 4, "block_size": 16, "head_dim": 32}
    pool = jax.eval_shape(lambda: MixedKVPool.zeros(dtypes=[FLOAT32, dtype], **sizes))
    tokens, ids = array(8, 4, 32), array(8, dtype="int32")
    function, arguments = (copy_blocks, (ids, ids)) if moves else (scatter_all_layers, (tokens, tokens, ids))
    memory = jax.jit(function, donate_argnums=0).lower(pool, *arguments).compile().memory_analysis()
    pool_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pool))
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < 2**20  # the smallest array, scales, is of 1 MiB


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

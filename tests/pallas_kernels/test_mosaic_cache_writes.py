"""The GPU kernels that write to the pool and move its blocks, in the interpreter: bytes, neighbours, races."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import KVPool
from jaxpaged.pallas_kernels.block_copy.mosaic_gpu import (
    copy_blocks_mosaic_gpu,
    gather_blocks_mosaic_gpu,
    scatter_blocks_mosaic_gpu,
)
from jaxpaged.pallas_kernels.cache_scatter.mosaic_gpu import cache_scatter_mosaic_gpu, tokens_per_block
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.tile_copy import MAX_TILE_BYTES, rows_per_tile
from tests.pallas_kernels.interpreter import interpreter
from tests.pallas_kernels.pool_oracle import (
    after_block_writes,
    after_scatter,
    blocks_of,
    distinct_slots,
    random_pair,
    random_pool,
)

LAYERS, BLOCKS = 2, 5


class Case(NamedTuple):
    """Shapes of a call, and of the chip."""

    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str = "bfloat16"
    num_tokens: int = 5
    num_padding: int = 2
    num_sms: int = 132
    detect_races: bool = True

    def name(self) -> str:
        tokens = f"{self.num_tokens}+{self.num_padding}"
        return f"H{self.num_kv_heads}-S{self.block_size}-D{self.head_dim}-{self.dtype}-{tokens}-sms{self.num_sms}"


CASES = [
    Case(8, 16, 128),
    Case(8, 16, 128, "float16", num_tokens=1, num_padding=0),
    Case(4, 32, 64, "float16", num_tokens=12),
    Case(2, 64, 192, num_tokens=3),
    Case(1, 128, 256, num_tokens=9),
    Case(3, 16, 96, "float16"),
    Case(6, 32, 128, num_tokens=1, num_padding=7),
    Case(5, 16, 64, num_tokens=30, num_padding=10, detect_races=False),
    Case(2, 16, 64, "float32"),
    # Tiles smaller than a warpgroup: one head.
    Case(1, 16, 64),
    Case(1, 16, 96, "float16"),
    Case(1, 64, 32),
    Case(1, 32, 192, "float16"),
    # As on a tiny chip: several tokens in a thread block, and fewer in the last one.
    Case(2, 16, 64, num_tokens=35, num_padding=6, num_sms=1),
    Case(7, 32, 128, "float16", num_tokens=36, num_padding=1, num_sms=2),
    # More heads than one tile holds.
    Case(96, 16, 128, "float16", num_tokens=3),
]
# A block has as many tiles as it needs; the number of tokens and the chip make no difference.
MOVES = [case for case in CASES if case.num_sms == 132 and case.num_kv_heads < 96]
PATHS = pytest.mark.parametrize("tma", [True, False], ids=["tma", "registers"])


def make_pool(case: Case) -> KVPool:
    """Some of what it holds is NaN: unused memory that must survive as it is."""
    pool = random_pool(
        num_layers=LAYERS,
        num_blocks=BLOCKS,
        num_kv_heads=case.num_kv_heads,
        block_size=case.block_size,
        head_dim=case.head_dim,
        dtype=case.dtype,
    )
    return KVPool(pool.k.at[-1, :, 1].set(jnp.nan), pool.v.at[1, :, 3].set(jnp.nan), LAYERS)


def target_of(case: Case, tma: bool) -> GpuTarget:
    return GpuTarget((9, 0) if tma else (8, 0), case.num_sms, "interpreted")


def check_bytes(pool: KVPool, expected: tuple[np.ndarray, np.ndarray]) -> None:
    """All of it, the dummy blocks too: the kernels leave them alone."""
    for array, wanted in zip((pool.k, pool.v), expected, strict=True):
        assert np.asarray(array).tobytes() == wanted.tobytes()


@PATHS
@pytest.mark.parametrize("case", CASES, ids=Case.name)
def test_scatter_writes_its_slots_and_nothing_else(case: Case, tma: bool) -> None:
    pool, real = make_pool(case), case.num_tokens
    slots = distinct_slots(pool, real, case.num_padding)
    k, v = random_pair((len(slots), case.num_kv_heads, case.head_dim))
    k, v = k.at[real:].set(jnp.nan), v.at[real:].set(jnp.nan)  # of padding tokens
    k = k.at[0, 0, :3].set(jnp.array([-0.0, jnp.inf, jnp.nan]))
    expected = after_scatter(pool, k, v, 1, slots[:real])
    with interpreter(detect_races=case.detect_races) as interpret:
        written = cache_scatter_mosaic_gpu(
            pool, k, v, 1, jnp.asarray(slots), interpret=interpret, target=target_of(case, tma)
        )
        check_bytes(written, expected)


@PATHS
def test_scatter_of_new_tokens_in_the_pools_own_dtype(tma: bool) -> None:
    case = CASES[0]
    pool, slots = make_pool(case), distinct_slots(make_pool(case), 4)
    k, v = random_pair((4, case.num_kv_heads, case.head_dim), case.dtype)
    expected = after_scatter(pool, k, v, 0, slots)
    with interpreter() as interpret:
        arguments = (pool, k, v, 0, jnp.asarray(slots))
        check_bytes(cache_scatter_mosaic_gpu(*arguments, tma=tma, interpret=interpret), expected)


def test_scatter_in_every_layer_of_one_program() -> None:
    """As an engine's step does: jitted, the pool donated, one launch a layer on what the one before left."""
    case = Case(2, 16, 64)
    pool, slots = make_pool(case), distinct_slots(make_pool(case), 3, num_padding=1)
    k, v = random_pair((4, 2, 64))
    expected = after_scatter(pool, k, v, 0, slots[:3])
    expected = after_scatter(KVPool(*map(jnp.asarray, expected), LAYERS), k + 1, v - 1, 1, slots[:3])
    with interpreter() as interpret:

        def step(pool: KVPool, k: jax.Array, v: jax.Array, slots: jax.Array) -> KVPool:
            pool = cache_scatter_mosaic_gpu(pool, k, v, 0, slots, interpret=interpret)
            return cache_scatter_mosaic_gpu(pool, k + 1, v - 1, 1, slots, interpret=interpret)

        check_bytes(jax.jit(step, donate_argnums=0)(pool, k, v, jnp.asarray(slots)), expected)


@PATHS
def test_two_tokens_of_one_slot_are_a_race(tma: bool) -> None:
    """What the other tests rely on: the detector sees it when two thread blocks write to one place."""
    case = Case(2, 16, 64)
    pool = make_pool(case)
    k, v = random_pair((2, 2, 64))
    slots = jnp.array([20, 20], jnp.int32)

    def write_both() -> None:
        with interpreter() as interpret:
            options = {"interpret": interpret, "target": target_of(case, tma)}
            jax.block_until_ready(cache_scatter_mosaic_gpu(pool, k, v, 1, slots, **options).k)

    # JAX 0.12 raises from the kernel; 0.11 goes on, and the interpreter's context fails in the end.
    with pytest.raises((jax.errors.JaxRuntimeError, AssertionError), match="RACE DETECTED"):
        write_both()


@PATHS
@pytest.mark.parametrize("case", MOVES, ids=Case.name)
def test_blocks_go_out_and_come_in(case: Case, tma: bool) -> None:
    pool, out_of, into = make_pool(case), [4, 1, 0, 2], [2, 0, 3]
    target = target_of(case, tma)
    with interpreter(detect_races=case.detect_races) as interpret:
        gathered = gather_blocks_mosaic_gpu(pool, jnp.array(out_of), interpret=interpret, target=target)
        for array, wanted in zip(gathered, blocks_of(pool, out_of), strict=True):
            assert np.asarray(array).tobytes() == wanted.tobytes()
    k, v = (array[:, 1:] for array in gathered)
    real = np.array([0, 2])
    expected = after_block_writes(pool, [2, 3], np.asarray(k)[:, real], np.asarray(v)[:, real])
    with interpreter(detect_races=case.detect_races) as interpret:
        arguments = (pool, jnp.array(into), k, v)
        check_bytes(scatter_blocks_mosaic_gpu(*arguments, interpret=interpret, target=target), expected)


def test_blocks_of_another_dtype_are_cast() -> None:
    case = Case(2, 16, 64, "float16")
    pool = make_pool(case)
    k, v = random_pair((LAYERS, 1, 2, 16, 64))
    with interpreter() as interpret:
        written = scatter_blocks_mosaic_gpu(pool, jnp.array([3]), k, v, interpret=interpret)
        check_bytes(written, after_block_writes(pool, [3], k, v))


@PATHS
def test_copies_read_all_sources_before_they_write(tma: bool) -> None:
    """A chain, a swap, one source for two targets, padding."""
    case = Case(2, 32, 64)
    pool = make_pool(case)
    swaps = [1, 2, 3, 4, 0], [2, 1, 4, 3, 0]
    chain = [1, 2, 2, 0, 0], [2, 3, 4, 0, 0]
    for sources, targets in (swaps, chain):
        expected = after_block_writes(pool, targets, *blocks_of(pool, sources))
        with interpreter() as interpret:
            ids = jnp.array(sources), jnp.array(targets)
            copied = copy_blocks_mosaic_gpu(pool, *ids, interpret=interpret, target=target_of(case, tma))
            check_bytes(copied, expected)


@pytest.mark.parametrize(
    ("num_tokens", "tile_bytes", "num_sms", "expected"),
    [
        (1, 2048, 132, 1),
        (256, 2048, 132, 1),
        (2112, 2048, 132, 2),
        (8192, 2048, 132, 4),
        (8448, 2048, 132, 8),
        (65536, 2048, 132, 8),
        (65536, 8192, 132, 2),
        (65536, 16384, 132, 1),
        (2304, 256, 144, 2),
    ],
)
def test_tokens_of_a_thread_block(num_tokens: int, tile_bytes: int, num_sms: int, expected: int) -> None:
    assert tokens_per_block(num_tokens, tile_bytes, num_sms) == expected


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "expected"),
    [(8, 256, 8), (128, 256, 64), (512, 256, 64), (96, 512, 32), (1, 512, 1), (1024, 64, 256), (3, 8192, 1)],
)
def test_rows_of_a_tile(num_rows: int, row_bytes: int, expected: int) -> None:
    rows = rows_per_tile(num_rows, row_bytes)
    assert rows == expected
    assert num_rows % rows == 0
    assert rows * row_bytes <= MAX_TILE_BYTES

"""The GPU kernels that write to quantised pools, in the interpreter: codes, scales, neighbours, races."""

from itertools import product
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
from jaxpaged.pallas_kernels.cache_scatter.mosaic_gpu import cache_scatter_mosaic_gpu
from jaxpaged.pallas_kernels.cache_scatter.mosaic_quantise import e4m3_bits, heads_per_tile
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.quantisation import FORMATS, dequantise
from jaxpaged.pallas_kernels.tile_copy import rows_layout, unsupported_reason
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
KINDS = pytest.mark.parametrize("kind", FORMATS)


class Case(NamedTuple):
    """Shapes of a call, and of the chip."""

    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str = "bfloat16"
    num_tokens: int = 2
    num_padding: int = 1
    num_sms: int = 132
    capability: tuple[int, int] = (9, 0)

    def name(self) -> str:
        major, minor = self.capability
        tokens = f"{self.num_tokens}+{self.num_padding}"
        shape = f"H{self.num_kv_heads}-S{self.block_size}-D{self.head_dim}-{self.dtype}-{tokens}"
        return f"{shape}-sms{self.num_sms}-sm{major}{minor}"


CASES = [
    Case(8, 16, 128),
    Case(1, 32, 96, "float16", capability=(8, 0)),
    Case(3, 16, 32, "float32", num_tokens=3, num_padding=0),
    # As on a tiny chip: several tokens in a thread block, and fewer in the last one.
    Case(2, 16, 64, num_tokens=18, num_padding=1, num_sms=1, capability=(8, 9)),
    # More heads than one tile holds.
    Case(48, 16, 128, "float16", num_tokens=1),
]
MOVES = [
    ("int8", True, Case(8, 16, 128)),
    ("fp8_e4m3", False, Case(8, 16, 128)),
    ("int4", True, Case(1, 16, 96)),
    ("int4", False, Case(1, 16, 96)),
    ("fp8_e4m3", True, Case(2, 64, 32)),
    # Rows of scales that are no multiple of 16 bytes.
    ("int8", True, Case(3, 6, 32)),
]


def make_pool(case: Case, kind: str) -> KVPool:
    return random_pool(
        num_layers=LAYERS,
        num_blocks=BLOCKS,
        num_kv_heads=case.num_kv_heads,
        block_size=case.block_size,
        head_dim=case.head_dim,
        dtype=kind,
    )


def target_of(case: Case) -> GpuTarget:
    return GpuTarget(case.capability, case.num_sms, "interpreted")


def check_bytes(pool: KVPool, expected: tuple[np.ndarray, ...]) -> None:
    """All of it, the dummy blocks too: the kernels leave them alone."""
    for array, wanted in zip(pool.arrays, expected, strict=True):
        assert np.asarray(array).tobytes() == wanted.tobytes()


@KINDS
@pytest.mark.parametrize("case", CASES, ids=Case.name)
def test_scatter_quantises_into_its_slots_and_nothing_else(case: Case, kind: str) -> None:
    pool, real = make_pool(case, kind), case.num_tokens
    slots = distinct_slots(pool, real, case.num_padding)
    k, v = random_pair((len(slots), case.num_kv_heads, case.head_dim), case.dtype)
    k, v = k.at[real:].set(jnp.nan), v.at[real:].set(jnp.nan)  # of padding tokens
    k, v = k.at[0, 0].set(0), v.at[0, 0].multiply(6e4 / 4)
    expected = after_scatter(pool, k[:real], v[:real], 1, slots[:real])
    with interpreter() as interpret:
        written = cache_scatter_mosaic_gpu(
            pool, k, v, 1, jnp.asarray(slots), interpret=interpret, target=target_of(case)
        )
        check_bytes(written, expected)


@KINDS
def test_a_vector_that_is_not_finite_reads_as_nan(kind: str) -> None:
    case = Case(2, 16, 32)
    pool = make_pool(case, kind)
    k, v = random_pair((1, 2, 32))
    k, v = k.at[0, 0, 7].set(jnp.nan), v.at[0, 0, 9].set(jnp.inf)
    with interpreter() as interpret:
        written = cache_scatter_mosaic_gpu(pool, k, v, 0, jnp.array([20]), interpret=interpret)
        for array, scales in ((written.k, written.k_scale), (written.v, written.v_scale)):
            found = np.asarray(dequantise(array[1, :, 4], scales[1, :, 4]))
            assert np.isnan(found[0]).all()
            assert np.isfinite(found[1]).all()


def test_scatter_in_every_layer_of_one_program() -> None:
    """As an engine's step does: jitted, the pool donated, one launch a layer on what the one before left."""
    case = Case(2, 16, 64)
    pool, slots = make_pool(case, "int8"), distinct_slots(make_pool(case, "int8"), 2, num_padding=1)
    k, v = random_pair((3, 2, 64))
    expected = after_scatter(pool, k[:2], v[:2], 0, slots[:2])
    expected = after_scatter(pool.with_arrays([*map(jnp.asarray, expected)]), k * 2, v, 1, slots[:2])
    with interpreter() as interpret:

        def step(pool: KVPool, k: jax.Array, v: jax.Array, slots: jax.Array) -> KVPool:
            pool = cache_scatter_mosaic_gpu(pool, k, v, 0, slots, interpret=interpret)
            return cache_scatter_mosaic_gpu(pool, k * 2, v, 1, slots, interpret=interpret)

        check_bytes(jax.jit(step, donate_argnums=0)(pool, k, v, jnp.asarray(slots)), expected)


def test_two_tokens_of_one_slot_are_a_race() -> None:
    """What the other tests rely on: the detector sees it when two thread blocks write to one place."""
    pool = make_pool(Case(2, 16, 64), "int8")
    k, v = random_pair((2, 2, 64))

    def write_both() -> None:
        with interpreter() as interpret:
            slots = jnp.array([20, 20], jnp.int32)
            jax.block_until_ready(cache_scatter_mosaic_gpu(pool, k, v, 1, slots, interpret=interpret).k)

    # JAX 0.12 raises from the kernel; 0.11 goes on, and the interpreter's context fails in the end.
    with pytest.raises((jax.errors.JaxRuntimeError, AssertionError), match="RACE DETECTED"):
        write_both()


@pytest.mark.parametrize(("kind", "tma", "case"), MOVES)
def test_blocks_go_out_and_come_in(kind: str, tma: bool, case: Case) -> None:
    pool, out_of, into = make_pool(case, kind), [4, 0, 2], [0, 3]
    with interpreter() as interpret:
        gathered = gather_blocks_mosaic_gpu(pool, jnp.array(out_of), interpret=interpret, tma=tma)
        assert len(gathered) == 4
        for array, wanted in zip(gathered, blocks_of(pool, out_of), strict=True):
            assert array.dtype == wanted.dtype
            assert np.asarray(array).tobytes() == wanted.tobytes()
    contents = [array[:, 1:] for array in gathered]
    expected = after_block_writes(pool, into[1:], *(array[:, 1:] for array in contents))
    with interpreter() as interpret:
        written = scatter_blocks_mosaic_gpu(pool, jnp.array(into), *contents, interpret=interpret, tma=tma)
        check_bytes(written, expected)


def test_copies_read_all_sources_before_they_write() -> None:
    """A swap and a chain, padding."""
    pool = make_pool(Case(2, 16, 64), "int4")
    sources, targets = [1, 2, 3, 0], [2, 1, 4, 0]
    expected = after_block_writes(pool, targets, *blocks_of(pool, sources))
    with interpreter() as interpret:
        ids = jnp.array(sources), jnp.array(targets)
        check_bytes(copy_blocks_mosaic_gpu(pool, *ids, interpret=interpret), expected)


def test_fp8_by_integers_is_the_conversion() -> None:
    """All numbers of sixteen bits up to 448, ties and subnormals among them, and the neighbours of each."""
    near = np.arange(2**16, dtype=np.uint32) << 16
    x = np.concatenate([near, near + 1, near - 1]).view(np.float32)
    x = jnp.asarray(x[np.abs(x) <= 448])
    expected = jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)
    np.testing.assert_array_equal(e4m3_bits(x), expected)
    assert int(e4m3_bits(jnp.float32(jnp.nan))) & 0x7F == 0x7F


@pytest.mark.parametrize("width", [1, 6, 16, 32, 48, 64, 96, 112, 128, 192, 256])
def test_layouts_are_those_of_mosaic_and_keep_a_row_in_a_warp(width: int) -> None:
    """The interpreter does not look at them; Mosaic's own class checks that they are canonical."""
    for rows, longest in product((1, 2, 3, 4, 6, 8, 12, 16, 32), (4, 8, 16)):
        layout = rows_layout(rows, width, longest).to_mgpu()
        tile_rows, tile_width = layout.base_tile_shape
        assert rows % tile_rows == 0
        assert width % tile_width == 0
        assert layout.vector_length <= longest
        # Nothing of a row is in another warp: the warps share rows, or do the same.
        columns = layout.tiling.tile_dimension(1)
        assert not any(columns[dim] for dim in layout.partitioned_warp_dims)


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "expected"),
    [(8, 128, 8), (32, 128, 32), (48, 128, 24), (17, 256, 1), (1, 32, 1)],
)
def test_heads_of_a_tile(num_heads: int, head_dim: int, expected: int) -> None:
    assert heads_per_tile(num_heads, head_dim) == expected


@KINDS
def test_the_kernels_say_what_they_take(kind: str) -> None:
    a100 = GpuTarget((8, 0), 108, "A100")
    assert unsupported_reason(make_pool(Case(2, 16, 64), kind), a100) is None
    reason = unsupported_reason(make_pool(Case(2, 16, 40), kind), a100)
    assert reason is not None
    assert "head_dim=40" in reason
    plain = KVPool(jnp.zeros((1, 1, 16, 64), jnp.int8), jnp.zeros((1, 1, 16, 64), jnp.int8), 1)
    assert "dtype=int8" in str(unsupported_reason(plain, a100))

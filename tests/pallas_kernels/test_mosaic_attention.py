"""The attention kernels of Mosaic GPU in the interpreter: races, sizes, splits, variants, determinism, refusals.

Against plain softmax in float64; ``test_mosaic_cases.py`` has the cases that all implementations share.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import AttentionVariant, KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case, make_inputs
from jaxpaged.pallas_kernels.paged_attention.mosaic_operands import KernelMods
from jaxpaged.pallas_kernels.paged_attention.mosaic_plan import DETERMINISTIC_SPLIT
from jaxpaged.pallas_kernels.paged_attention.mosaic_tile import Item, TileShape, block_ids
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig
from tests.pallas_kernels.mosaic import FORMS, MMA, SMALL_GPU, WGMMA, attend_interpreted, by_name, check
from tests.pallas_kernels.oracle import num_real, one_row

RACED = ("mixed", "sliding_window", "all_at_once", "speculative")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [c for c in CASES if c.name in RACED], ids=by_name)
def test_no_races_and_no_trace_of_large_values(case: Case, form: str) -> None:
    check(case, FORMS[form], detect_races=True, poison=1e30)


_ROWS = ((0, 3), (70, 1), (150, 2), (0, 17))


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (Case("stages", _ROWS), replace(MMA, stages=4)),
        (Case("stages_wgmma", _ROWS), replace(WGMMA, stages=4)),
        (Case("short_tiles", _ROWS), replace(MMA, tile_kv=32)),
        (Case("long_tiles", _ROWS), replace(MMA, tile_kv=128)),
        (Case("long_tiles_wgmma", _ROWS), replace(WGMMA, tile_kv=128)),
        (Case("tiles_in_a_block", _ROWS, block_size=128), replace(MMA, tile_kv=32)),
        (Case("blocks_of_64", _ROWS, block_size=64, head_dim=96), WGMMA),
        (Case("head_dim_192", _ROWS, head_dim=192), MMA),
        (Case("head_dim_192_wgmma", _ROWS, head_dim=192), WGMMA),
        (Case("more_rows", _ROWS), replace(MMA, tile_m=64)),
        (Case("group_of_3", _ROWS, num_heads=6), MMA),
        (Case("group_of_5_wgmma", _ROWS, num_heads=5, num_kv_heads=1), WGMMA),
        (Case("group_of_20", _ROWS, num_heads=20, num_kv_heads=1), MMA),
        (Case("group_of_64", _ROWS, num_heads=64, num_kv_heads=1), MMA),
        (Case("group_of_64_wgmma", _ROWS, num_heads=64, num_kv_heads=1), WGMMA),
        (Case("all_at_the_window", ((100, 1), (64, 20)), variant=AttentionVariant(sliding_window=64)), MMA),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
@pytest.mark.parametrize("dtype", ["float16"])
def test_sizes(case: Case, config: MosaicConfig, dtype: str) -> None:
    check(case, config, dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_sms", [1, 3, 8])
def test_splits_of_long_rows_make_the_whole(form: str, num_sms: int) -> None:
    case = Case("split", ((900, 1), (5, 1), (300, 4)), variant=AttentionVariant(sinks=jnp.linspace(-1, 1, 4)))
    check(case, replace(FORMS[form], ctas_per_sm=4), target=GpuTarget((9, 0), num_sms, "interpreter"))


def test_a_row_that_sees_nothing_is_zero_or_what_its_sink_leaves() -> None:
    nothing = lambda row, head, q_pos, kv_pos: q_pos < 0  # noqa: E731
    for sinks in (None, jnp.zeros(4)):
        case = Case("nothing", ((70, 2),), variant=AttentionVariant(mask_mod=nothing, sinks=sinks))
        out = attend_interpreted(case, make_inputs(case, dtype=jnp.dtype("bfloat16")))
        np.testing.assert_array_equal(out, 0)


DOCUMENTS = np.repeat(np.arange(40), 7).astype(np.int32)
BIAS = np.linspace(-2, 2, 4 * 300, dtype=np.float32).reshape(4, 300)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "variant",
    [
        AttentionVariant(mask_mod=lambda r, h, q, k: jnp.asarray(DOCUMENTS)[q] == jnp.asarray(DOCUMENTS)[k]),
        AttentionVariant(score_mod=lambda s, r, h, q, k: s + jnp.asarray(BIAS)[h, q - k]),
        AttentionVariant(score_mod=lambda s, r, h, q, k: s * jnp.asarray([0.5, 2.0, 1.0, 1.0, 1.0, 1.0])[r]),
        AttentionVariant(score_mod=lambda s, r, h, q, k: s + jnp.asarray(BIAS)[0, k] * jnp.float32(0.5)),
    ],
    ids=["documents", "bias_table", "by_row", "by_key"],
)
def test_variants_over_arrays(variant: AttentionVariant, form: str) -> None:
    check(Case("arrays", _ROWS, variant=variant), FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_what_blocks_before_the_window_hold_does_not_matter(form: str) -> None:
    """Their memory may have been given to others, who may hold anything."""
    window, rows = 20, ((300, 1), (130, 9), (3, 2))
    case = Case("window", rows, variant=AttentionVariant(sliding_window=window))
    q, pool, batch = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    clean = attend_interpreted(case, (q, pool, batch), FORMS[form])
    assert np.isfinite(clean).all(), "else NaN would equal NaN below"
    arrays = [np.array(x, np.float32) for x in (pool.k, pool.v)]
    for row, (cached, _) in enumerate(rows):
        for index in range(max(0, cached - window + 1) // case.block_size):
            for array in arrays:
                array[int(batch.block_tables[row, index]) + pool.num_blocks] = np.nan  # in layer 1
    poisoned = KVPool(*(jnp.asarray(x, jnp.bfloat16) for x in arrays), pool.num_layers)
    np.testing.assert_array_equal(attend_interpreted(case, (q, poisoned, batch), FORMS[form]), clean)


@pytest.mark.parametrize("window", [None, 1, 20, 64])
@pytest.mark.parametrize(("first", "last"), [(5, 5), (130, 138), (300, 300)])
@pytest.mark.parametrize("block_size", [16, 32, 128])
def test_only_blocks_that_a_query_sees_are_loaded(
    block_size: int, first: int, last: int, window: int | None
) -> None:
    """For the rest the dummy block is, which no request owns."""
    tile_kv, base = 64, 1000
    shape = TileShape(MMA, 16, 8, 2, 64, block_size, 1.0, None, window, KernelMods(None, None), True)
    table = jnp.arange(1, 512 // block_size + 1, dtype=jnp.int32)[None, :]
    oldest = 0 if window is None else max(0, first - window + 1)
    begin, end = oldest // tile_kv, last // tile_kv + 1
    places = jnp.int32(first), jnp.int32(last), jnp.int32(begin)
    item = Item(0, 0, 0, *places, end - begin, token=0, part=-1, last_key=last, key_tiles=None)
    loaded = set()
    for step in range(end - begin + 2):  # and what is looked up ahead of the last step
        loaded |= {int(block) - base for block in block_ids(shape, table, base, item, step)}
    seen = {int(table[0, position // block_size]) for position in range(oldest, last + 1)}
    assert loaded - {0} == seen


LONG = DETERMINISTIC_SPLIT + 300


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_means_the_same_bits_in_every_batch(form: str) -> None:
    """Alone and in company, a token at a time and several: and with splits as they come, not the same."""
    case = Case("company", ((LONG, 2), (200, 1), (0, 5)), num_heads=2, num_kv_heads=1, padding_rows=1)
    inputs = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    config = FORMS[form]
    target = GpuTarget((9, 0), 5, "interpreter")
    together = attend_interpreted(case, inputs, config, deterministic=True, target=target)
    for row, last in ((0, 2), (0, 1), (1, 1), (2, 3)):
        end = sum(n for _, n in case.rows[: row + 1])
        for sms in (1, 4):
            gpu = GpuTarget((9, 0), sms, "interpreter")
            alone = one_row(inputs, row, last, end - last)
            out = attend_interpreted(case, alone, config, deterministic=True, target=gpu)
            np.testing.assert_array_equal(out, together[end - last : end])
    free = attend_interpreted(case, inputs, config, target=target)[:2]
    alone_free = attend_interpreted(case, one_row(inputs, 0, 2, 0), config, target=target)
    assert (free != alone_free).any(), "else this test could not fail"
    assert num_real(inputs[2]) == 8


LARGE = MosaicConfig("mma", tile_kv=128, stages=4)


@pytest.mark.parametrize(
    ("case", "config", "target", "words"),
    [
        (Case("a", _ROWS, head_dim=80), None, SMALL_GPU, "head_dim=80 is none of"),
        (Case("a", _ROWS, block_size=8), None, SMALL_GPU, "block_size=8 is none of"),
        (Case("a", _ROWS, num_heads=65, num_kv_heads=1), None, SMALL_GPU, "at most 64 may share one"),
        (Case("a", _ROWS), WGMMA, GpuTarget((8, 0), 108, "NVIDIA A100"), "needs a Hopper GPU"),
        (
            Case("a", _ROWS, head_dim=256),
            LARGE,
            SMALL_GPU,
            r"needs 5\d+ bytes of shared memory, interpreter has 23",
        ),
        (Case("a", _ROWS), None, GpuTarget((7, 5), 40, "Tesla T4"), "compute capability 7.5 of Tesla T4"),
    ],
)
def test_what_is_refused(case: Case, config: MosaicConfig | None, target: GpuTarget, words: str) -> None:
    inputs = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    with pytest.raises(NotImplementedError, match=words):
        attend_interpreted(case, inputs, config, target=target)


def test_float32_is_refused() -> None:
    case = Case("a", _ROWS)
    with pytest.raises(
        NotImplementedError, match="takes bfloat16 or float16, queries and pool alike, got float32"
    ):
        attend_interpreted(case, make_inputs(case))


def test_a_bias_table_larger_than_memory_is_refused() -> None:
    case = Case(
        "wide",
        ((5, 1),),
        variant=AttentionVariant(score_mod=lambda s, r, h, q, k: s + jnp.asarray(BIAS)[h, q - k]),
    )
    q, pool, batch = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    wide = jnp.pad(batch.block_tables, ((0, 0), (0, 2**20)))
    with pytest.raises(
        NotImplementedError,
        match=r"indexed by head and q_pos and kv_pos would take 6.0 GiB for 3 query tiles",
    ):
        attend_interpreted(case, (q, pool, replace(batch, block_tables=wide)))

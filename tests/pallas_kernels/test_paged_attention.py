"""Every implementation of paged attention over every case."""

import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import AttentionVariant, causal_attention
from jaxpaged.pallas_kernels.paged_attention import IMPLEMENTATIONS
from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case, alibi, make_inputs
from tests.pallas_kernels.oracle import attend, chunk, compiled, num_real, one_row, softmax_attention

# Sizes that fit no vector register and no chunk, in addition to those that benchmarks share.
MORE_CASES = (
    Case("odd_head_dim", ((0, 9), (21, 1), (7, 5)), head_dim=20),
    Case("odd_block_size", ((0, 9), (300, 1), (31, 11)), block_size=12),
    Case("odd_both", ((0, 9), (600, 2)), head_dim=6, block_size=5, num_heads=3, num_kv_heads=1),
    Case("block_size_96", ((0, 200), (500, 1)), block_size=96),
    Case("block_size_512", ((600, 3), (0, 2)), block_size=512),
    Case(
        "short_window_many_queries",
        ((600, 40), (0, 90)),
        variant=AttentionVariant(sliding_window=7),
        block_size=4,
    ),
    Case("everything_masked", ((4, 3),), variant=AttentionVariant(mask_mod=lambda r, h, q, k: q < 0)),
)
ALL_CASES = CASES + MORE_CASES

# Those that run on a CPU; test_mosaic_attention.py has the kernels that need a GPU, in the interpreter.
ON_CPU = [name for name in IMPLEMENTATIONS if name != "mosaic_gpu"]

# Scores reach about 20, so float32 rounding of a score (2**-24 relative, a sum of D products) is up to about 5e-6,
# which is the relative error of a weight; outputs are of order one.
TOLERANCE = 2e-5


def by_name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", ALL_CASES, ids=by_name)
@pytest.mark.parametrize("name", ON_CPU)
def test_equals_plain_softmax_whatever_unused_slots_hold(name: str, case: Case) -> None:
    for poison in (np.nan, 1e30):
        inputs = make_inputs(case, poison=poison)
        if name == "numba" and case.variant.has_mods:
            with pytest.raises(
                NotImplementedError, match=r"'numba': score_mod and mask_mod are JAX functions"
            ):
                attend(name, case, inputs)
            return
        out = attend(name, case, inputs)
        assert np.isfinite(out).all(), "padding included"
        expected = softmax_attention(inputs[0], inputs[1], 1, inputs[2], case.variant)
        np.testing.assert_allclose(out[: len(expected)], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", [CASES[4], CASES[13], CASES[19], CASES[22]], ids=by_name)
def test_low_precision_is_as_good_as_the_reference(case: Case) -> None:
    inputs = make_inputs(case, dtype=jnp.dtype(jnp.bfloat16))
    exact = softmax_attention(inputs[0], inputs[1], 1, inputs[2], case.variant)
    error = {
        name: np.abs(attend(name, case, inputs)[: len(exact)] - exact).max() for name in ("reference", "xla")
    }
    assert error["xla"] <= 2 * error["reference"] + 1e-5
    with pytest.raises(NotImplementedError, match="float32 only, got queries bfloat16 and pool bfloat16"):
        attend("numba", case, inputs)


WINDOW = 20
WINDOW_ROWS = ((700, 1), (130, 40), (400, 9), (3, 2))


@pytest.mark.parametrize("name", ON_CPU)
def test_blocks_before_the_window_are_not_read(name: str) -> None:
    """Their memory may have been given to others, who may hold anything."""
    case = Case("window", WINDOW_ROWS, variant=AttentionVariant(sliding_window=WINDOW))
    q, pool, batch = make_inputs(case)
    clean = attend(name, case, (q, pool, batch))
    k, v = np.array(pool.k), np.array(pool.v)
    for row, (cached, _) in enumerate(WINDOW_ROWS):
        for index in range(max(0, cached - WINDOW + 1) // case.block_size):
            gone = int(batch.block_tables[row, index]) + pool.num_blocks  # in layer 1
            k[gone] = v[gone] = np.nan
    poisoned = type(pool)(jnp.asarray(k), jnp.asarray(v), pool.num_layers)
    np.testing.assert_array_equal(attend(name, case, (q, poisoned, batch)), clean)


@pytest.mark.parametrize("name", ["xla", "numba"])
def test_work_follows_the_tokens_not_the_table(name: str) -> None:
    """The same rows in tables a thousand times as wide: a walk over the table would take that much longer."""
    case = Case("narrow", ((40, 1), (20, 1), (0, 30), (9, 1)))
    q, pool, batch = make_inputs(case)
    wide = jnp.pad(batch.block_tables, ((0, 0), (0, 1024 * batch.block_tables.shape[1])))
    wide_batch = type(batch)(**{**vars(batch), "block_tables": wide})
    attention = compiled(name, 1, case.variant)

    def seconds(inputs: tuple[object, ...]) -> float:
        attention(*inputs).block_until_ready()
        times = []
        for _ in range(7):
            started = time.perf_counter()
            attention(*inputs).block_until_ready()
            times.append(time.perf_counter() - started)
        return min(times)

    np.testing.assert_array_equal(attention(q, pool, wide_batch), attention(q, pool, batch))
    assert seconds((q, pool, wide_batch)) < 20 * seconds((q, pool, batch)) + 2e-3


@pytest.mark.parametrize("name", ["xla", "numba"])
def test_a_row_is_the_same_alone_and_in_company(name: str) -> None:
    """Up to rounding for xla, which tiles by what else there is unless told not to; to the last bit for numba."""
    case = Case("company", ((37, 5), (100, 1), (0, 20)), padding_tokens=0, padding_rows=0)
    q, pool, batch = make_inputs(case)
    together = attend(name, case, (q, pool, batch))
    at = 0
    for row, (_, new) in enumerate(case.rows):
        out = attend(name, case, one_row((q, pool, batch), row, new, at))
        np.testing.assert_allclose(out, together[at : at + new], atol=0 if name == "numba" else 1e-6, rtol=0)
        at += new


SOME_CASES = (
    "one_token",
    "mixed",
    "speculative",
    "long_window",
    "all_at_once",
    "odd_both",
    "everything_masked",
)


@pytest.mark.parametrize("name", SOME_CASES)
def test_deterministic_tiles_compute_the_same(name: str) -> None:
    case = next(case for case in ALL_CASES if case.name == name)
    inputs = make_inputs(case)
    out = attend("xla", case, inputs, deterministic=True)
    assert np.isfinite(out).all(), "padding included"
    expected = softmax_attention(inputs[0], inputs[1], 1, inputs[2], case.variant)
    np.testing.assert_allclose(out[: len(expected)], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "variant"),
    [
        ("bfloat16", AttentionVariant()),
        ("float32", AttentionVariant(sliding_window=11, logit_soft_cap=3.0, sinks=jnp.arange(4.0))),
    ],
    ids=["plain", "window_cap_sinks"],
)
def test_deterministic_tokens_have_the_same_bits_however_they_come(
    dtype: str, variant: AttentionVariant
) -> None:
    """In one step with others, one by one, or in chunks cut anywhere."""
    rows = ((37, 12), (200, 1), (3, 1), (0, 33), (130, 9), *((7 * i, 1) for i in range(9)))
    case = Case("company", rows, head_dim=32, variant=variant)
    inputs = make_inputs(case, dtype=jnp.dtype(dtype))
    together = attend("xla", case, inputs, deterministic=True)
    places = [
        (0, 0, 1),
        (0, 7, 1),
        (0, 3, 5),
        (1, 0, 1),
        (2, 0, 1),
        (3, 1, 1),
        (3, 20, 5),
        (4, 4, 5),
        (4, 8, 1),
    ]
    for row, first, count in places:
        at = int(inputs[2].query_start_loc[row]) + first
        some = attend("xla", case, chunk(inputs, row, at, count), deterministic=True)
        np.testing.assert_array_equal(some, together[at : at + count], err_msg=f"row {row}, token {first}")


DOCUMENTS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3], np.int32)
BIAS = np.linspace(-2, 2, 4 * 14, dtype=np.float32).reshape(4, 14)


@pytest.mark.parametrize(
    "variant",
    [
        AttentionVariant(),
        alibi(4),
        AttentionVariant(logit_soft_cap=2.0, sliding_window=5, sinks=jnp.arange(4.0)),
        AttentionVariant(mask_mod=lambda r, h, q, k: jnp.asarray(DOCUMENTS)[q] == jnp.asarray(DOCUMENTS)[k]),
        AttentionVariant(score_mod=lambda s, r, h, q, k: s * (r + 1) + jnp.asarray(BIAS)[h, q - k]),
    ],
    ids=["plain", "alibi", "window_cap_sinks", "documents", "bias_table"],
)
@pytest.mark.parametrize("name", ["reference", "xla"])
def test_equals_causal_attention_of_whole_sequences(name: str, variant: AttentionVariant) -> None:
    """What a model trains with is what it serves with; leading axes of the one are rows of the other."""
    length, rows = 14, 3
    case = Case(
        "whole", ((0, length),) * rows, block_size=4, padding_tokens=0, padding_rows=0, variant=variant
    )
    q, pool, batch = make_inputs(case, seed=3)
    blocks = batch.slots // 4 + pool.num_blocks
    k, v = (x[blocks, :, batch.slots % 4].reshape(rows, length, 2, 64) for x in (pool.k, pool.v))
    dense = causal_attention(q.reshape(rows, length, 4, 64), k, v, variant=variant)
    paged = attend(name, case, (q, pool, batch))
    np.testing.assert_allclose(paged, np.asarray(dense).reshape(paged.shape), atol=TOLERANCE, rtol=0)


def test_padding_changes_nothing() -> None:
    padded = Case("padded", ((5, 3), (17, 1)), padding_tokens=30, padding_rows=9)
    q, pool, batch = make_inputs(padded)
    exact = type(batch)(
        batch.block_tables[:2],
        batch.seq_lens[:2],
        batch.query_start_loc[:3],
        *(getattr(batch, name)[:4] for name in ("rows", "positions", "slots")),
    )
    for name in ON_CPU:
        out = compiled(name, 0, padded.variant)(q[:4], pool, exact)
        np.testing.assert_allclose(
            np.asarray(out), attend(name, padded, (q, pool, batch), 0)[: num_real(batch)], atol=1e-6, rtol=0
        )

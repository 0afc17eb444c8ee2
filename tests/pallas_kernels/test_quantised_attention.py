"""Attention over pools of codes and scales, on the CPU."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant, KVPool, paged_attention
from jaxpaged.pallas_kernels.paged_attention import best_implementation, unsupported_reason
from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case, alibi, make_inputs
from jaxpaged.pallas_kernels.quantisation import FORMATS
from tests.pallas_kernels.oracle import attend, chunk, softmax_attention
from tests.pallas_kernels.test_paged_attention import TOLERANCE

EVERYTHING = AttentionVariant(scale=0.2, logit_soft_cap=5.0, sliding_window=20, sinks=jnp.arange(4.0) - 1)
ROWS = ((0, 7), (37, 1), (16, 16), (130, 1), (0, 33))
MIXED, EVERY = Case("mixed", ROWS), Case("everything", ROWS, variant=EVERYTHING)
# What the compiled loops do differently: whole vectors or not, one chunk or several, a window that begins in a block.
LOOPS = (
    MIXED,
    EVERY,
    *(
        case
        for case in CASES
        if case.name in ("head_dim_96", "head_dim_256", "block_size_128", "long_window")
    ),
    Case("half_a_vector", ROWS, head_dim=24),
    Case("odd_both", ((0, 9), (600, 2)), head_dim=6, block_size=5, num_heads=3, num_kv_heads=1),
)
# The largest magnitude in each format, NaN where it has one.
WORST = {"fp8_e4m3": 0x7F, "int8": 0x80, "int4": 0x88}
TYPICAL = {"fp8_e4m3": 100.0, "int8": 74.0, "int4": 4.5}


def quantised_inputs(case: Case, name: str) -> tuple[jax.Array, KVPool, AttentionBatch]:
    """Random codes and scales; slots that no token owns get the worst codes, and NaN for a scale."""
    q, pool, batch = make_inputs(case)
    rng = np.random.default_rng(1)
    width = case.head_dim // FORMATS[name].per_byte
    arrays = []
    for vectors in (pool.k, pool.v):
        unused = np.isnan(np.asarray(vectors)).any(-1)
        codes = rng.integers(0, 256, (*unused.shape, width), np.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # NaN in fp8
        codes[unused] = WORST[name]
        scales = rng.uniform(0.5, 1.0, unused.shape) / TYPICAL[name]
        arrays.append((codes, np.where(unused, np.nan, scales).astype(np.float32)))
    (k, k_scale), (v, v_scale) = arrays
    return q, quantised_pool(name, pool.num_layers, k, v, k_scale, v_scale), batch


def quantised_pool(name: str, num_layers: int, k: Any, v: Any, k_scale: Any, v_scale: Any) -> KVPool:
    storage = FORMATS[name].storage
    return KVPool(
        *(jnp.asarray(x.view(storage)) for x in (k, v)), num_layers, *map(jnp.asarray, (k_scale, v_scale))
    )


def numbers(stored: jax.Array, scale: jax.Array) -> np.ndarray:
    """What codes and scales stand for, by numpy."""
    codes = np.asarray(stored)
    if codes.dtype == np.uint8:
        low, high = codes & 15, codes >> 4
        codes = np.concatenate([low, high], axis=-1).astype(np.int8)
        codes = np.where(codes > 7, codes - 16, codes)
    return codes.astype(np.float32) * np.asarray(scale)[..., None]


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize(
    ("name", "case"),
    [("reference", EVERY), ("xla", MIXED), ("xla", EVERY), *(("numba", case) for case in LOOPS)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_equals_plain_softmax_whatever_unused_slots_hold(name: str, case: Case, format_name: str) -> None:
    q, pool, batch = quantised_inputs(case, format_name)
    assert pool.k_scale is not None
    assert pool.v_scale is not None
    plain = replace(
        pool, k=numbers(pool.k, pool.k_scale), v=numbers(pool.v, pool.v_scale), k_scale=None, v_scale=None
    )
    expected = softmax_attention(q, plain, 1, batch, case.variant)
    out = attend(name, case, (q, pool, batch))
    assert np.isfinite(out).all(), "padding included"
    np.testing.assert_allclose(out[: len(expected)], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_code_has_its_value(format_name: str) -> None:
    """A token that sees only itself gets its own value, to the last bit: subnormal codes, and NaN, are no others."""
    kind = FORMATS[format_name]
    case = Case("itself", ((0, 1),), head_dim=256 * kind.per_byte, num_heads=1, num_kv_heads=1, num_layers=1)
    q, pool, batch = quantised_inputs(case, format_name)
    every = np.broadcast_to(np.arange(256, dtype=np.uint8), pool.v.shape).copy()
    scale = np.full(pool.v.shape[:3], 0.37, np.float32)
    pool = quantised_pool(format_name, 1, np.zeros_like(every), every, scale, scale)
    out = np.asarray(paged_attention(jnp.zeros_like(q), pool, 0, batch, implementation="numba"))[0, 0]
    np.testing.assert_array_equal(out, numbers(pool.v, scale)[0, 0, 0])
    assert np.isnan(out).sum() == (2 if format_name == "fp8_e4m3" else 0)


@pytest.mark.parametrize("name", ["xla", "numba"])
def test_blocks_before_the_window_are_not_read(name: str) -> None:
    case = Case("window", ((700, 1), (130, 40)), variant=AttentionVariant(sliding_window=20))
    q, pool, batch = quantised_inputs(case, "fp8_e4m3")
    clean = attend(name, case, (q, pool, batch))
    tables = np.asarray(batch.block_tables) + pool.num_blocks  # in layer 1
    gone = np.concatenate([tables[row, : (cached - 19) // 16] for row, (cached, _) in enumerate(case.rows)])
    arrays = [np.array(array) for array in pool.arrays]
    for array in arrays:
        array[gone] = np.nan
    poisoned = pool.with_arrays([jnp.asarray(array) for array in arrays])
    np.testing.assert_array_equal(attend(name, case, (q, poisoned, batch)), clean)


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", ["xla", "numba"])
def test_deterministic_tokens_have_the_same_bits_however_they_come(name: str, format_name: str) -> None:
    """In one step with others, one by one, or in chunks cut anywhere."""
    case = Case("company", ((37, 12), (200, 1), (0, 33)), head_dim=32, variant=EVERYTHING)
    inputs = quantised_inputs(case, format_name)
    together = attend(name, case, inputs, deterministic=True)
    for row, first, count in [(0, 0, 1), (0, 7, 1), (0, 3, 5), (1, 0, 1), (2, 20, 5)]:
        at = int(inputs[2].query_start_loc[row]) + first
        some = attend(name, case, chunk(inputs, row, at, count), deterministic=True)
        np.testing.assert_array_equal(some, together[at : at + count], err_msg=f"row {row}, token {first}")


def test_which_implementation_a_pool_of_codes_gets() -> None:
    q, pool, _ = quantised_inputs(MIXED, "int8")
    assert best_implementation("cpu", q, pool, AttentionVariant()) == "numba"
    assert best_implementation("cpu", q, pool, alibi(4)) == "xla"
    assert best_implementation("cpu", q.astype(jnp.bfloat16), pool, AttentionVariant()) == "xla"
    bare = replace(pool, k_scale=None, v_scale=None)
    reason = unsupported_reason("numba", q, bare, AttentionVariant())
    assert reason == "it computes in float32 only, got queries float32 and pool int8"

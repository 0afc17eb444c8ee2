"""Codes and scales: how near they are to the vectors, and what becomes of those that are hard to keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels.quantisation import (
    FORMATS,
    KVFormat,
    codes_of,
    dequantise,
    format_of,
    pack_int4,
    quantise,
    unpack_int4,
)
from tests.pallas_kernels.pool_oracle import quantised

KINDS = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS.keys())
FLOAT32 = np.finfo(np.float32)
BFLOAT16_MAX = float(jnp.finfo(jnp.bfloat16).max)


def vectors(dtype: str = "float32", size: float = 1.0) -> jax.Array:
    """``[50, 64]``, of all sizes within a vector."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((50, 64)) * 2.0 ** rng.integers(-12, 1, (50, 64))
    return jnp.asarray(x / np.abs(x).max() * size, dtype)


def check_bounds(x: jax.Array, kind: str) -> None:
    """The table of the module's docstring."""
    codes, scale = quantise(x, FORMATS[kind])
    exact, found = np.asarray(x, np.float64), np.asarray(dequantise(codes, scale), np.float64)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    bound = {
        "fp8_e4m3": np.maximum(np.abs(exact) / 16, np.asarray(scale, np.float64)[:, None] / 1024),
        "int8": largest / 254,
        "int4": largest / 14,
    }[kind]
    assert np.isfinite(found).all()
    assert (np.abs(found - exact) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@KINDS
def test_the_error_is_what_the_table_says(kind: KVFormat, dtype: str) -> None:
    check_bounds(vectors(dtype), kind.name)


@pytest.mark.parametrize("size", [1e-29, 1e-20, 6e4, 1e30, BFLOAT16_MAX, float(FLOAT32.max)])
@KINDS
def test_small_and_huge_vectors_are_kept_as_well(kind: KVFormat, size: float) -> None:
    check_bounds(vectors(size=size), kind.name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@KINDS
def test_compiled_or_not_it_is_what_numpy_computes(kind: KVFormat, dtype: str) -> None:
    x = vectors(dtype)
    expected = quantised(x, kind.name)
    for found in (quantise(x, kind), jax.jit(quantise, static_argnums=1)(x, kind)):
        for array, wanted in zip(found, expected, strict=True):
            assert array.dtype == wanted.dtype
            assert np.asarray(array).tobytes() == wanted.tobytes()


@KINDS
def test_what_is_read_is_written_again_as_it_was(kind: KVFormat) -> None:
    """A vector that went through a pool once loses nothing more: a block that is recomputed is the same."""
    codes, scale = quantise(vectors(), kind)
    again, scale_again = quantise(dequantise(codes, scale), kind)
    assert np.asarray(again).tobytes() == np.asarray(codes).tobytes()
    np.testing.assert_array_max_ulp(np.asarray(scale), np.asarray(scale_again), maxulp=2)


@pytest.mark.parametrize("value", [0.0, -0.0, float(FLOAT32.smallest_subnormal), 1e-38, 9e-31])
@KINDS
def test_a_vector_of_almost_nothing_is_zero(kind: KVFormat, value: float) -> None:
    x = jnp.full((3, 8), value).at[1].set(0)
    codes, scale = quantise(x, kind)
    assert (np.asarray(scale) == 1).all()
    assert not np.asarray(dequantise(codes, scale)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@KINDS
def test_a_vector_that_is_not_finite_stays_visible_and_alone(kind: KVFormat, value: float) -> None:
    x = vectors()[:3].at[1, 5].set(value)
    found = np.asarray(dequantise(*quantise(x, kind)))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_rounding_is_to_the_nearest_and_to_even() -> None:
    # The largest element makes the scale 1.
    x = jnp.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, 100.49, -100.51]])
    codes, scale = quantise(x, FORMATS["int8"])
    assert float(scale[0]) == 1.0
    assert codes[0].tolist() == [127, 0, 2, 2, 0, -2, 100, -101]


@KINDS
def test_the_largest_element_gets_the_largest_code(kind: KVFormat) -> None:
    codes = np.asarray(codes_of(quantise(vectors(), kind)[0]))
    assert (np.abs(codes).max(axis=-1) == kind.largest).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@KINDS
def test_codes_are_exact_in_sixteen_bits(kind: KVFormat, dtype: str) -> None:
    stored = jnp.arange(256, dtype=jnp.uint8)
    if kind.per_byte == 1:
        stored = jax.lax.bitcast_convert_type(stored, kind.storage)
    exact = np.asarray(codes_of(stored))
    np.testing.assert_array_equal(np.asarray(codes_of(stored, jnp.dtype(dtype)), np.float32), exact)


def test_int4_pairs_go_into_a_byte_and_come_back() -> None:
    low, high = np.meshgrid(np.arange(-8, 8), np.arange(-8, 8))
    codes = jnp.asarray(np.stack([low.ravel(), high.ravel()], axis=1), jnp.int8)  # [256, D=2]
    packed = pack_int4(codes)
    assert packed.shape == (256, 1)
    assert sorted(packed[:, 0].tolist()) == list(range(256))
    np.testing.assert_array_equal(unpack_int4(packed), codes)


def test_a_byte_of_int4_holds_elements_half_a_vector_apart() -> None:
    packed = pack_int4(jnp.array([1, 2, 3, -1, -2, -8], jnp.int8))
    assert packed.tolist() == [0xF1, 0xE2, 0x83]


@KINDS
def test_a_format_is_known_by_the_dtype_of_its_arrays(kind: KVFormat) -> None:
    assert format_of(kind.storage) == kind
    assert format_of(jnp.bfloat16) is None

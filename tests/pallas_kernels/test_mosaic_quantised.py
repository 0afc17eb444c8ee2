"""Mosaic GPU attention over quantised pools, in the interpreter.

Against plain softmax in float64 over what the pools hold; and how words become numbers, exhaustively.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels import AttentionVariant
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.paged_attention import mosaic_codes
from jaxpaged.pallas_kernels.paged_attention.cases import Case
from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import shared_memory, unsupported_reason
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig
from jaxpaged.pallas_kernels.quantisation import FORMATS, KVFormat, codes_of
from tests.pallas_kernels.mosaic import MMA, SMALL_GPU, WGMMA, attend_interpreted
from tests.pallas_kernels.oracle import attend, softmax_attention
from tests.pallas_kernels.quantised import numbers_of, quantised_inputs

ROWS = ((0, 3), (100, 2))
ALL_AT_ONCE = AttentionVariant(
    logit_soft_cap=5.0,
    sliding_window=50,
    sinks=jnp.array([0.5, -1.0, 2.0, 0.0]),
    score_mod=lambda s, r, h, q, k: s + 0.01 * (k % 3) - 0.1 * h,
    mask_mod=lambda r, h, q, k: (k % 5 != 0) | (q == k),
)


def check(case: Case, name: str, config: MosaicConfig, dtype: str = "bfloat16", **options: Any) -> None:
    """Within three times the error of the reference in the same dtype: of few keys roundings do not average out."""
    q, pool, batch = inputs = quantised_inputs(case, FORMATS[name], dtype)
    exact = softmax_attention(q, numbers_of(pool), 1, batch, case.variant)
    allowed = 3 * np.abs(attend("reference", case, inputs)[: len(exact)] - exact).max() + 1e-5
    out = attend_interpreted(case, inputs, config, **options)
    assert np.isfinite(out).all(), "padding included"
    assert np.abs(out[: len(exact)] - exact).max() <= allowed


@pytest.mark.parametrize("config", [MMA, WGMMA], ids=["mma", "wgmma"])
@pytest.mark.parametrize("name", FORMATS)
def test_no_races_and_no_trace_of_nan(name: str, config: MosaicConfig) -> None:
    check(Case("ragged", ROWS), name, config, detect_races=True)


@pytest.mark.parametrize(
    ("case", "name", "config", "dtype"),
    [
        (Case("variant", ROWS, variant=ALL_AT_ONCE), "fp8_e4m3", replace(MMA, stages=3), "bfloat16"),
        (Case("variant", ROWS, variant=ALL_AT_ONCE), "int4", WGMMA, "bfloat16"),
        (
            Case("large_blocks", ROWS, head_dim=128, block_size=128),
            "int8",
            replace(MMA, tile_kv=32),
            "float16",
        ),
        (Case("large_blocks", ROWS, head_dim=128, block_size=128), "fp8_e4m3", WGMMA, "float16"),
        (Case("wide", ROWS, head_dim=256), "int4", MMA, "float16"),
        (Case("wide", ROWS, head_dim=256), "int8", WGMMA, "bfloat16"),
        (Case("odd_columns", ROWS, head_dim=96), "int8", MMA, "bfloat16"),
        (Case("odd_columns", ROWS, head_dim=192), "int4", MMA, "bfloat16"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else None,
)
def test_sizes(case: Case, name: str, config: MosaicConfig, dtype: str) -> None:
    check(case, name, config, dtype, target=GpuTarget((9, 0), 1, "interpreter"))


def test_before_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales come through registers there. The interpreter knows no ``cp.async``: copies are made at once instead."""

    def copy(source: Any, target: Any, **_: Any) -> None:
        target[...] = source[...]

    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", copy)
    monkeypatch.setattr(plgpu, "wait_gmem_to_smem", lambda *_: None)
    check(Case("ragged", ROWS, head_dim=128), "int8", MMA, target=GpuTarget((8, 0), 2, "interpreter"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
def test_every_word_becomes_its_codes(kind: KVFormat, dtype: str) -> None:
    words = jnp.arange(2**16, dtype=jnp.uint16)
    stored = lax.bitcast_convert_type(
        lax.bitcast_convert_type(words, jnp.uint8).reshape(-1, 64), kind.storage
    )
    parts = mosaic_codes.parts_of(
        mosaic_codes.words_of(stored), kind, jnp.dtype(dtype), None, interpreted=True
    )
    unit = mosaic_codes.unit_of(kind, jnp.dtype(dtype))
    found = np.asarray(mosaic_codes.from_parts(jnp.concatenate(parts, axis=-1), kind), np.float64) * unit
    codes = np.asarray(codes_of(stored), np.float64)
    # No number is lost; what is none becomes one.
    np.testing.assert_array_equal(found, np.where(np.isnan(codes), np.copysign(480.0, found), codes))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
def test_the_same_with_subnormals_and_shifts_of_pairs(kind: KVFormat, dtype: str) -> None:
    """As the GPU does it: in numpy, two words a register whose bits cross in shifts, and the format's arithmetic."""
    low, high = np.arange(2**16, dtype=np.uint32), np.arange(2**16, dtype=np.uint32)[::-1]
    numbers = mosaic_codes.NUMBERS[jnp.dtype(dtype)]

    def shifted(pairs: Any, left: int) -> Any:
        whole = np.asarray(pairs).view(np.uint32)
        return (whole << np.uint32(left) if left > 0 else whole >> np.uint32(-left)).view(np.uint16)

    pairs = (low | high << np.uint32(16)).view(np.uint16)
    wanted = mosaic_codes.parts_of(jnp.asarray(pairs), kind, jnp.dtype(dtype), None, interpreted=True)
    for (bits, factor, subtracted, last), want in zip(
        mosaic_codes.bits_of_parts(pairs, kind, numbers, shifted), wanted, strict=True
    ):
        held = np.asarray(bits).view(jnp.dtype(dtype)).astype(np.float64)
        constants = np.array([factor, subtracted, last], np.float64)
        np.testing.assert_array_equal(constants.astype(dtype).astype(np.float64), constants)
        np.testing.assert_array_equal((held * factor - subtracted) * last, np.asarray(want, np.float64))


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_an_order(name: str) -> None:
    x = jnp.arange(3 * 64).reshape(3, 64)
    ordered = mosaic_codes.by_part(x, FORMATS[name])
    assert (ordered != x).any()
    np.testing.assert_array_equal(mosaic_codes.from_parts(ordered, FORMATS[name]), x)


@pytest.mark.parametrize(
    ("case", "name", "dtype", "target", "words"),
    [
        (Case("a", ROWS, head_dim=96), "int4", "bfloat16", SMALL_GPU, "head_dim=96 is no multiple of 64"),
        (Case("a", ROWS), "int8", "float32", SMALL_GPU, "takes bfloat16 or float16"),
        (Case("a", ROWS), "int4", "bfloat16", GpuTarget((8, 0), 108, "A100"), "need Hopper or newer"),
        (Case("a", ROWS, head_dim=128), "int4", "bfloat16", GpuTarget((8, 0), 108, "A100"), None),
    ],
)
def test_what_is_refused(case: Case, name: str, dtype: str, target: GpuTarget, words: str | None) -> None:
    q, pool, batch = quantised_inputs(case, FORMATS[name], dtype)
    reason = unsupported_reason(target, q, pool, case.variant, batch)
    assert reason is None if words is None else reason is not None and words in reason


def test_codes_take_less_shared_memory() -> None:
    sizes = [shared_memory(MMA, 16, 128, kind) for kind in (None, FORMATS["int8"], FORMATS["int4"])]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[1]

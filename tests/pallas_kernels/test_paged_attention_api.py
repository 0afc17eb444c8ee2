"""Which implementation is taken, and what is refused."""

import dataclasses
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant, KVPool, mosaic_gpu, paged_attention
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.paged_attention import best_implementation, numba_cpu
from jaxpaged.pallas_kernels.paged_attention.api import _log_choice
from jaxpaged.pallas_kernels.paged_attention.cases import Case, alibi, make_inputs
from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import paged_attention_mosaic_gpu
from tests.pallas_kernels.oracle import softmax_attention

CASE = Case("api", ((5, 3), (17, 1)), num_heads=8, num_kv_heads=4, head_dim=16)


def with_field(batch: AttentionBatch, name: str, value: Any) -> AttentionBatch:
    return dataclasses.replace(batch, **{name: value})


def test_unknown_implementation() -> None:
    with pytest.raises(
        ValueError, match=r"implementation='triton' is none of \['mosaic_gpu', 'numba', 'reference', 'xla'\]"
    ):
        paged_attention(*take(CASE), implementation="triton")


def take(case: Case, **changes: Any) -> tuple[jax.Array, KVPool, int, AttentionBatch]:
    q, pool, batch = make_inputs(case)
    return (
        changes.get("q", q),
        changes.get("pool", pool),
        changes.get("layer", 0),
        changes.get("batch", batch),
    )


@pytest.mark.parametrize("name", ["seq_lens", "query_start_loc", "rows", "positions", "slots"])
def test_batch_fields_of_the_wrong_size(name: str) -> None:
    batch = make_inputs(CASE)[2]
    short = with_field(batch, name, getattr(batch, name)[1:])
    with pytest.raises(ValueError, match=rf"batch\.{name}\.shape="):
        paged_attention(*take(CASE, batch=short))


@pytest.mark.parametrize("layer", [-1, 2])
def test_layer_out_of_range(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer={layer} is not in \[0, 2\)"):
        paged_attention(*take(CASE, layer=layer))


@pytest.mark.parametrize("shape", [(7, 8, 32), (7, 6, 16), (7, 128)], ids=str)
def test_queries_that_do_not_fit_the_pool(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"q\.shape="):
        paged_attention(*take(CASE, q=jnp.zeros(shape)))


def test_pool_of_two_shapes() -> None:
    pool = make_inputs(CASE)[1]
    with pytest.raises(ValueError, match=r"kv_pool\.v\.shape="):
        paged_attention(*take(CASE, pool=KVPool(pool.k, pool.v[1:], 2)))


def test_sinks_of_the_wrong_size() -> None:
    variant = AttentionVariant(sinks=jnp.zeros(4))
    with pytest.raises(ValueError, match=r"variant\.sinks\.shape=\(4,\) must be \(8,\)"):
        paged_attention(*take(CASE), variant=variant)


@pytest.mark.parametrize(
    ("platform", "dtype", "variant", "expected"),
    [
        ("cpu", "float32", AttentionVariant(), "numba"),
        ("cpu", "float32", AttentionVariant(sliding_window=3, logit_soft_cap=2.0), "numba"),
        ("cpu", "float32", alibi(8), "xla"),
        ("cpu", "bfloat16", AttentionVariant(), "xla"),
        ("some new device", "bfloat16", AttentionVariant(), "xla"),
    ],
)
def test_the_best_one_for_a_call(platform: str, dtype: str, variant: AttentionVariant, expected: str) -> None:
    q, pool, _ = make_inputs(CASE, dtype=jnp.dtype(dtype))
    assert best_implementation(platform, q, pool, variant) == expected


ON_GPU = Case("gpu", ((5, 3), (17, 1)), num_heads=8, num_kv_heads=4, head_dim=64)
COSINE = AttentionVariant(score_mod=lambda score, row, head, q_pos, kv_pos: jnp.cos(score))


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "variant", "reason"),
    [
        ((9, 0), "bfloat16", 64, AttentionVariant(), None),
        ((9, 0), "float16", 128, alibi(8), None),
        ((9, 0), "float32", 64, AttentionVariant(), "takes bfloat16 or float16"),
        ((9, 0), "bfloat16", 80, AttentionVariant(), "head_dim=80 is none of"),
        ((9, 0), "bfloat16", 64, COSINE, "cos"),
        ((8, 0), "bfloat16", 64, AttentionVariant(), "chosen by itself on Hopper only and must be named"),
        ((7, 5), "bfloat16", 64, AttentionVariant(), "compute capability 7.5"),
    ],
)
def test_the_best_one_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    dtype: str,
    head_dim: int,
    variant: AttentionVariant,
    reason: str | None,
) -> None:
    """And where it is not the kernel, the log says why, once."""
    monkeypatch.setattr(mosaic_gpu, "gpu_target", lambda: GpuTarget(capability, 132, "GPU of a test"))
    _log_choice.cache_clear()
    case = dataclasses.replace(ON_GPU, head_dim=head_dim)
    q, pool, batch = make_inputs(case, dtype=jnp.dtype(dtype))
    with caplog.at_level(logging.INFO, logger="jaxpaged"):
        for _ in range(2):
            chosen = best_implementation("gpu", q, pool, variant, batch)
    assert chosen == ("xla" if reason else "mosaic_gpu")
    assert len(caplog.records) == 1
    assert (reason or "made for this device") in caplog.text


def test_the_kernel_needs_a_gpu() -> None:
    words = "'mosaic_gpu': it needs an NVIDIA GPU, and the default"
    with pytest.raises(NotImplementedError, match=words):
        paged_attention(*take(CASE), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=words):
        paged_attention_mosaic_gpu(*take(CASE), AttentionVariant())


def test_determinism_is_refused_where_nothing_is_done_for_it() -> None:
    with pytest.raises(NotImplementedError, match="deterministic=True with implementation='reference'"):
        paged_attention(*take(CASE), implementation="reference", deterministic=True)


def test_what_is_always_deterministic_is_when_asked() -> None:
    asked = paged_attention(*take(CASE), implementation="numba", deterministic=True)
    np.testing.assert_array_equal(asked, paged_attention(*take(CASE), implementation="numba"))


def test_none_takes_the_best_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    q, pool, _ = make_inputs(CASE)
    with caplog.at_level(logging.INFO, logger="jaxpaged"):
        for _ in range(3):
            best_implementation("a device for this test", q, pool, AttentionVariant())
    assert caplog.text.count("a device for this test") == 1
    automatic = paged_attention(*take(CASE))
    named = paged_attention(*take(CASE), implementation="numba")
    np.testing.assert_array_equal(automatic, named)
    # A variant with functions, and no variant at all, both run without being told how.
    assert paged_attention(*take(CASE), variant=alibi(8)).shape == (7, 8, 16)


@pytest.mark.parametrize(
    ("cores", "heads", "expected"), [(1, 8, 1), (2, 8, 2), (2, 3, 1), (3, 8, 2), (64, 6, 6)]
)
def test_a_layer_is_split_over_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, heads: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert numba_cpu.num_parts(heads) == expected


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    "variant",
    [
        AttentionVariant(),
        AttentionVariant(sinks=jnp.linspace(-1, 1, 8), sliding_window=9, logit_soft_cap=4.0),
    ],
    ids=["plain", "everything"],
)
def test_parts_of_a_layer_make_the_whole(
    monkeypatch: pytest.MonkeyPatch, parts: int, variant: AttentionVariant
) -> None:
    q, pool, batch = make_inputs(CASE)

    def run(layer: int) -> jax.Array:
        def call(q: jax.Array, pool: KVPool, batch: AttentionBatch) -> jax.Array:
            return paged_attention(q, pool, layer, batch, variant=variant, implementation="numba")

        return jax.jit(call)(q, pool, batch)

    monkeypatch.setattr(numba_cpu, "num_parts", lambda heads: 1)
    whole = run(1)
    monkeypatch.setattr(numba_cpu, "num_parts", lambda heads: parts)
    np.testing.assert_array_equal(run(1), whole)
    expected = softmax_attention(q, pool, 1, batch, variant)
    np.testing.assert_allclose(np.asarray(whole)[: len(expected)], expected, atol=2e-5, rtol=0)

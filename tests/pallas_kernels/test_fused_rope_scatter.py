"""Rotation and scatter in one launch: as rotating and then scattering, and nothing else is touched."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.models.rope import apply_rope
from jaxpaged.pallas_kernels import KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.rope_scatter import rope_scatter
from jaxpaged.pallas_kernels.rope_scatter.mosaic_gpu import rope_scatter_mosaic_gpu
from tests.pallas_kernels.interpreter import interpreter
from tests.pallas_kernels.pool_oracle import after_scatter, distinct_slots, random_pool

LAYERS, BLOCKS, SIZE = 2, 5, 16
H200, A100 = GpuTarget((9, 0), 132, "interpreter"), GpuTarget((8, 0), 108, "interpreter")
STEP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-22}  # of the last bit, relative


class Case(NamedTuple):
    num_kv_heads: int
    group: int
    head_dim: int
    num_tokens: int
    num_padding: int
    dtype: str


CASES = [
    Case(2, 4, 128, 9, 2, "bfloat16"),
    Case(1, 1, 64, 8, 0, "float16"),
    Case(1, 2, 192, 2, 1, "float32"),
]
Inputs = tuple[jax.Array, jax.Array, jax.Array, KVPool, np.ndarray]


def make_inputs(case: Case) -> Inputs:
    pool = random_pool(
        num_layers=LAYERS,
        num_blocks=BLOCKS,
        num_kv_heads=case.num_kv_heads,
        block_size=SIZE,
        head_dim=case.head_dim,
        dtype=case.dtype,
    )
    rng = np.random.default_rng(2)
    num_tokens = case.num_tokens + case.num_padding
    qkv = rng.standard_normal((num_tokens, case.num_kv_heads, case.group + 2, case.head_dim))
    angles = rng.uniform(0, 100, (num_tokens, case.head_dim // 2)).astype(np.float32)
    slots = distinct_slots(pool, case.num_tokens, case.num_padding)
    return jnp.asarray(qkv, case.dtype), jnp.cos(angles), jnp.sin(angles), pool, slots


def expected(inputs: Inputs, layer: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """By the model's own rotation, and a loop over the tokens that are no padding."""
    qkv, cos, sin, pool, slots = inputs
    real = slots > 0
    q = apply_rope(qkv[:, :, :-2], cos[:, None, None], sin[:, None, None])
    k = apply_rope(qkv[:, :, -2], cos[:, None], sin[:, None])
    arrays = after_scatter(pool, k[real], qkv[real, :, -1], layer, slots[real])
    return np.asarray(q.reshape(len(slots), -1, qkv.shape[3])), arrays


@pytest.mark.parametrize("target", [H200, A100], ids=["tma", "registers"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"D{case.head_dim}-{case.dtype}")
def test_the_kernel_rotates_and_writes(case: Case, target: GpuTarget) -> None:
    inputs = make_inputs(case)
    qkv, cos, sin, pool, slots = inputs
    expected_q, (expected_k, expected_v) = expected(inputs, 1)
    with interpreter() as interpret:
        q, written = rope_scatter_mosaic_gpu(
            qkv, cos, sin, pool, 1, jnp.asarray(slots), interpret=interpret, target=target
        )
        found = [np.asarray(x) for x in (q, written.k, written.v)]
    np.testing.assert_array_equal(found[2], expected_v)
    # A fused multiply-add rounds once less, which may move the last bit.
    for got, wanted in ((found[0], expected_q), (found[1], expected_k)):
        error = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
        assert (error <= STEP[case.dtype] * np.maximum(np.abs(wanted.astype(np.float64)), 1.0)).all()
    unchanged = np.asarray(pool.k) == expected_k
    np.testing.assert_array_equal(found[1][unchanged], expected_k[unchanged])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_plain_jax_rotates_and_writes(implementation: str) -> None:
    inputs = make_inputs(CASES[0])
    expected_q, (expected_k, expected_v) = expected(inputs, 1)
    real = inputs[4] > 0
    q, written = rope_scatter(
        *(x[real] for x in inputs[:3]),
        inputs[3],
        1,
        jnp.asarray(inputs[4][real]),
        implementation=implementation,
    )
    np.testing.assert_array_equal(np.asarray(q), expected_q[real])
    np.testing.assert_array_equal(np.asarray(written.k), expected_k)
    np.testing.assert_array_equal(np.asarray(written.v), expected_v)


def test_what_does_not_fit_is_refused() -> None:
    qkv, cos, sin, pool, slots = make_inputs(CASES[0])
    at = jnp.asarray(slots)
    with pytest.raises(ValueError, match=r"cos\.shape=\(11, 32\)"):
        rope_scatter(qkv, cos[:, ::2], sin, pool, 1, at)
    with pytest.raises(ValueError, match="layer=2"):
        rope_scatter(qkv, cos, sin, pool, 2, at)
    with pytest.raises(ValueError, match="implementation='triton'"):
        rope_scatter(qkv, cos, sin, pool, 1, at, implementation="triton")
    with pytest.raises(NotImplementedError, match=r"qkv\.dtype=float32"):
        rope_scatter_mosaic_gpu(qkv.astype("float32"), cos, sin, pool, 1, at, target=H200)

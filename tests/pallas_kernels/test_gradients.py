"""Gradients of paged attention: those of the reference, of dense attention, and differences of a float64 oracle."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import (
    AttentionBatch,
    AttentionVariant,
    KVPool,
    cache_scatter,
    causal_attention,
    paged_attention,
    paged_attention_step,
)
from jaxpaged.pallas_kernels.paged_attention.blocks import read_blocks
from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case, make_inputs
from jaxpaged.pallas_kernels.paged_attention.differentiable import scatter_and_attend
from jaxpaged.pallas_kernels.paged_attention.mosaic_gpu import paged_attention_mosaic_gpu
from jaxpaged.pallas_kernels.paged_attention.reference import paged_attention_reference
from jaxpaged.pallas_kernels.quantisation import FORMATS, quantise
from tests.pallas_kernels.interpreter import interpreter
from tests.pallas_kernels.mosaic import MMA, SMALL_GPU
from tests.pallas_kernels.oracle import num_real, softmax_attention

LAYER = 1
BY_NAME = {case.name: case for case in CASES}
Inputs = tuple[jax.Array, jax.Array, jax.Array, KVPool, AttentionBatch, jax.Array]
Step = Callable[[jax.Array, jax.Array, jax.Array, KVPool, AttentionBatch], jax.Array]


def step_inputs(case: Case, dtype: str = "float32") -> Inputs:
    """q, k, v, pool, batch, and weights of the outputs in the loss, those of padding tokens not zero."""
    q, pool, batch = make_inputs(case, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(1)
    k, v = (
        jnp.asarray(rng.standard_normal((len(q), case.num_kv_heads, case.head_dim)), dtype) for _ in range(2)
    )
    return q, k, v, pool, batch, jnp.asarray(rng.standard_normal(q.shape), jnp.float32)


def written(pool: KVPool, k: jax.Array, v: jax.Array, batch: AttentionBatch, layer: int = LAYER) -> KVPool:
    """The pool with the step's keys and values, in a way that JAX differentiates; zeros in the place of NaN."""
    real = jnp.arange(len(batch.slots)) < batch.query_start_loc[-1]
    block = jnp.where(real, layer * pool.num_blocks + batch.slots // pool.block_size, len(pool.k))
    k, v = (
        jnp.nan_to_num(old)
        .at[block, :, batch.slots % pool.block_size]
        .set(new.astype(old.dtype), mode="drop")
        for old, new in ((pool.k, k), (pool.v, v))
    )
    return replace(pool, k=k, v=v)


def gradients_of(step: Step, inputs: Inputs) -> tuple[np.ndarray, ...]:
    """Those of the weighted sum of all outputs in q, k and v."""
    q, k, v, pool, batch, weights = inputs

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (step(q, k, v, pool, batch).astype(jnp.float32) * weights).sum()

    return tuple(np.asarray(x, np.float64) for x in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))


def by_implementation(name: str, variant: AttentionVariant) -> Step:
    def step(q: jax.Array, k: jax.Array, v: jax.Array, pool: KVPool, batch: AttentionBatch) -> jax.Array:
        return paged_attention_step(q, k, v, pool, LAYER, batch, variant=variant, implementation=name)[0]

    return step


def by_reference(variant: AttentionVariant) -> Step:
    def step(q: jax.Array, k: jax.Array, v: jax.Array, pool: KVPool, batch: AttentionBatch) -> jax.Array:
        out = paged_attention_reference(q, written(pool, k, v, batch), LAYER, batch, variant)
        real = jnp.arange(len(q)) < batch.query_start_loc[-1]
        return jnp.where(real[:, None, None], out, 0.0)

    return step


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("chunked_prefill", "numba"),
        ("only_padding", "reference"),
        ("mqa", "numba"),
        ("block_size_1", "numba"),
        ("long_window", "numba"),
        ("sinks", "numba"),
        ("all_at_once", "xla"),
    ],
)
def test_equal_those_of_the_reference(name: str, implementation: str) -> None:
    """Padding tokens have none, though the loss looks at them; slots that nobody has written hold NaN."""
    case = BY_NAME[name]
    inputs = step_inputs(case)
    found = gradients_of(by_implementation(implementation, case.variant), inputs)
    expected = gradients_of(by_reference(case.variant), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5, rtol=0)
        np.testing.assert_array_equal(mine[num_real(inputs[4]) :], 0.0)


SMALL = Case("small", ((5, 3), (17, 1), (0, 4)), num_heads=4, num_kv_heads=2, head_dim=8, block_size=4)


def test_equal_finite_differences() -> None:
    """Of attention in numpy and float64."""
    variant = AttentionVariant(logit_soft_cap=3.0, sliding_window=6, sinks=jnp.array([0.5, -1.0, 2.0, 0.0]))
    inputs = step_inputs(SMALL)
    found = gradients_of(by_implementation("numba", variant), inputs)
    q, k, v, pool, batch, weights = inputs
    pool = written(pool, k, v, batch)
    slots = np.asarray(batch.slots)[: num_real(batch)]
    block, offset = LAYER * pool.num_blocks + slots // pool.block_size, slots % pool.block_size
    rng = np.random.default_rng(2)

    def loss(arrays: list[np.ndarray]) -> float:
        pools = [np.array(x, np.float64) for x in (pool.k, pool.v)]
        for held, new in zip(pools, arrays[1:], strict=True):
            held[block, :, offset] = new[: len(slots)]
        exact = replace(pool, k=pools[0], v=pools[1])
        out = softmax_attention(arrays[0], exact, LAYER, batch, variant)  # type: ignore[arg-type]
        return float((out * np.asarray(weights, np.float64)[: len(out)]).sum())

    at = [np.asarray(x, np.float64) for x in (q, k, v)]
    for which in range(3):
        direction, step = rng.standard_normal(at[which].shape), 1e-5
        ends = [
            loss([x + sign * step * direction if i == which else x for i, x in enumerate(at)])
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(
            (found[which] * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5
        )


def test_trained_slopes_and_sinks_of_whole_prompts() -> None:
    """Against dense attention, which knows of no cache and whose gradient is JAX's own."""
    lengths, heads = (70, 9), 4
    case = Case("prompts", tuple((0, n) for n in lengths), num_heads=heads, head_dim=16)
    q, k, v, pool, batch, weights = step_inputs(case)

    def variant(slopes: jax.Array, sinks: jax.Array) -> AttentionVariant:
        def alibi(score: Any, row: Any, head: Any, q_pos: Any, kv_pos: Any) -> Any:
            return score - slopes[head] * (q_pos - kv_pos)

        return AttentionVariant(score_mod=alibi, sinks=sinks, logit_soft_cap=4.0)

    def paged(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array, sinks: jax.Array) -> jax.Array:
        out, _ = paged_attention_step(q, k, v, pool, LAYER, batch, variant=variant(slopes, sinks))
        return (out * weights).sum()

    def dense(q: jax.Array, k: jax.Array, v: jax.Array, slopes: jax.Array, sinks: jax.Array) -> jax.Array:
        total, start = jnp.float32(0.0), 0
        for length in lengths:
            row = slice(start, start + length)
            out = causal_attention(q[row], k[row], v[row], variant=variant(slopes, sinks))
            total, start = total + (out * weights[row]).sum(), start + length
        return total

    arguments = q, k, v, jnp.array([0.5, 0.1, 0.02, 0.0]), jnp.array([0.5, -1.0, 2.0, 0.0])
    found, expected = (jax.jit(jax.grad(f, argnums=range(5)))(*arguments) for f in (paged, dense))
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_score_mod_without_a_derivative_where_it_is_masked() -> None:
    strength = jnp.array([0.3, 0.7, 0.0, 1.0])
    q, k, v, pool, batch, weights = step_inputs(SMALL)

    @jax.jit
    def loss(strength: jax.Array) -> jax.Array:
        # Of keys in the future, the root of a negative number.
        variant = AttentionVariant(
            score_mod=lambda s, row, head, q_pos, kv_pos: s - strength[head] * jnp.sqrt(q_pos - kv_pos + 1.0)
        )
        return (paged_attention_step(q, k, v, pool, LAYER, batch, variant=variant)[0] * weights).sum()

    found, step = jax.jit(jax.grad(loss))(strength), 1e-2
    for head in range(4):
        ends = [loss(strength.at[head].add(sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose(found[head], (ends[0] - ends[1]) / (2 * step), atol=2e-3)


def test_low_precision() -> None:
    """As near to the exact gradients as those of the reference in the same dtype, within twice the error."""
    case = BY_NAME["chunked_prefill"]
    inputs = step_inputs(case, "bfloat16")
    exact_inputs = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, inputs)
    exact = gradients_of(by_reference(case.variant), exact_inputs)
    theirs = gradients_of(by_reference(case.variant), inputs)
    found = gradients_of(by_implementation("xla", case.variant), inputs)
    for mine, reference, truth in zip(found, theirs, exact, strict=True):
        assert np.abs(mine - truth).max() <= 2 * np.abs(reference - truth).max()


def test_forward_pass_of_a_gpu_kernel() -> None:
    case = replace(SMALL, head_dim=64, block_size=16)
    inputs = step_inputs(case, "bfloat16")
    expected = gradients_of(by_reference(case.variant), inputs)
    with interpreter(detect_races=False) as interpret:
        kernel = partial(paged_attention_mosaic_gpu, config=MMA, interpret=interpret, target=SMALL_GPU)

        def step(q: jax.Array, k: jax.Array, v: jax.Array, pool: KVPool, batch: AttentionBatch) -> jax.Array:
            return scatter_and_attend(kernel, q, k, v, pool, LAYER, batch, case.variant)[0]

        found = gradients_of(step, inputs)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=4e-2, rtol=0)


def test_rounding_to_a_quantised_pool_counts_as_the_identity() -> None:
    """Gradients are those at the keys and values that were read back."""
    q, k, v, pool, batch, weights = step_inputs(SMALL)
    codes, scales = zip(
        *(quantise(jnp.nan_to_num(x), FORMATS["int8"]) for x in (pool.k, pool.v)), strict=True
    )
    coded = KVPool(*codes, 2, *scales)
    after = cache_scatter(coded, k, v, LAYER, batch.slots)
    plain = KVPool(*read_blocks(after, jnp.arange(len(after.k))), 2)
    at = LAYER * pool.num_blocks + batch.slots // pool.block_size, batch.slots % pool.block_size
    rounded = tuple(x[at[0], :, at[1]] for x in (plain.k, plain.v))
    step = by_implementation("reference", SMALL.variant)
    found = gradients_of(step, (q, k, v, coded, batch, weights))
    expected = gradients_of(step, (q, *rounded, plain, batch, weights))
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)


Layer = Callable[[jax.Array, KVPool, int], tuple[jax.Array, KVPool]]


@cache
def chain_inputs(
    spare_blocks: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array], KVPool, AttentionBatch, jax.Array]:
    """Hidden states and projections of two layers, over a pool that has more blocks than the rows need."""
    q, _, _, pool, batch, weights = step_inputs(SMALL)
    rng = np.random.default_rng(3)
    width = SMALL.num_heads * SMALL.head_dim
    sizes = {"q": SMALL.num_heads, "k": SMALL.num_kv_heads, "v": SMALL.num_kv_heads}
    matrices = {
        n: jnp.asarray(width**-0.5 * rng.standard_normal((2, width, heads * SMALL.head_dim)), jnp.float32)
        for n, heads in sizes.items()
    }
    padded = (
        jnp.pad(
            x.reshape(2, pool.num_blocks, *x.shape[1:]), ((0, 0), (0, spare_blocks), (0, 0), (0, 0), (0, 0))
        ).reshape(-1, *x.shape[1:])
        for x in (pool.k, pool.v)
    )
    return q.reshape(len(q), width), matrices, KVPool(*padded, 2), batch, weights


def chain_loss(
    step: Any,
    x: jax.Array,
    matrices: dict[str, jax.Array],
    pool: KVPool,
    batch: AttentionBatch,
    weights: jax.Array,
) -> tuple[jax.Array, KVPool]:
    """Of two layers, each with the pool that the one before returned."""
    for layer in range(2):
        q, k, v = ((x @ matrices[n][layer]).reshape(len(x), -1, SMALL.head_dim) for n in ("q", "k", "v"))
        out, pool = step(q, k, v, pool, layer, batch)
        x = x + out.reshape(x.shape)
    real = (jnp.arange(len(x)) < batch.query_start_loc[-1])[:, None]
    return jnp.where(real, x * weights.reshape(x.shape), 0.0).sum(), pool


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_chain_of_layers(recompute: bool) -> None:
    x, matrices, pool, batch, weights = chain_inputs()

    def reference(
        q: jax.Array, k: jax.Array, v: jax.Array, pool: KVPool, layer: int, batch: AttentionBatch
    ) -> tuple[jax.Array, KVPool]:
        pool = written(pool, k, v, batch, layer)
        return paged_attention_reference(q, pool, layer, batch, AttentionVariant()), pool

    step = jax.checkpoint(paged_attention_step, static_argnums=(4,)) if recompute else paged_attention_step
    (found, _), (expected, _) = (
        jax.jit(jax.grad(partial(chain_loss, s), argnums=(0, 1), has_aux=True))(
            x, matrices, pool, batch, weights
        )
        for s in (step, reference)
    )
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(mine, theirs, atol=2e-5, rtol=0)


def test_the_pool_stays_in_its_place() -> None:
    """A chain of layers under ``jax.grad`` keeps no second copy of a donated pool."""
    x, matrices, pool, batch, weights = chain_inputs(4000)
    step = partial(paged_attention_step, implementation="xla")
    gradient = jax.grad(partial(chain_loss, step), argnums=(0, 1), has_aux=True)
    memory = (
        jax.jit(gradient, donate_argnums=2)
        .lower(x, matrices, pool, batch, weights)
        .compile()
        .memory_analysis()
    )
    size = pool.k.nbytes + pool.v.nbytes
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 8


def test_queries_over_a_constant_pool() -> None:
    q, k, v, pool, batch, weights = step_inputs(SMALL)
    pool = cache_scatter(pool, k, v, LAYER, batch.slots)
    found = jax.jit(jax.grad(lambda q: (paged_attention(q, pool, LAYER, batch) * weights).sum()))(q)
    expected = gradients_of(by_reference(SMALL.variant), (q, k, v, pool, batch, weights))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_a_gradient_of_the_pool_is_refused() -> None:
    q, k, v, pool, batch, _ = step_inputs(SMALL)
    words = r"paged_attention: no gradient with respect to kv_pool.*paged_attention_step"
    with pytest.raises(NotImplementedError, match=words):
        jax.grad(lambda pool: paged_attention(q, pool, LAYER, batch).sum())(pool)

    def scattered(k: jax.Array, keep: Callable[[KVPool], KVPool]) -> jax.Array:
        return paged_attention(q, keep(cache_scatter(pool, k, v, LAYER, batch.slots)), LAYER, batch).sum()

    with pytest.raises(NotImplementedError, match=words):
        jax.jit(jax.grad(scattered), static_argnums=1)(k, lambda pool: pool)
    constant = jax.grad(scattered)(k, jax.lax.stop_gradient)
    np.testing.assert_array_equal(constant, 0.0)

    def shared(k: jax.Array) -> jax.Array:
        """A layer that attends to the keys of another."""
        _, after = paged_attention_step(q, k, v, pool, LAYER, batch)
        return paged_attention(q, after, LAYER, batch).sum()

    with pytest.raises(NotImplementedError, match=words):
        jax.grad(shared)(k)


def test_second_derivatives_are_refused() -> None:
    q, k, v, pool, batch, weights = step_inputs(SMALL)

    def loss(q: jax.Array) -> jax.Array:
        return (paged_attention_step(q, k, v, pool, LAYER, batch)[0] ** 2 * weights).sum()

    with pytest.raises(NotImplementedError, match="no second derivatives"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(q)

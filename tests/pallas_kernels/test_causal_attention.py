"""Dense causal attention; that it agrees with the paged one is shown in ``test_paged_attention``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import AttentionVariant, causal_attention


def random_inputs(*lead: int, heads: int = 4, kv_heads: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = ((*lead, heads, 8), (*lead, kv_heads, 8), (*lead, kv_heads, 8))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return q, k, v


def test_equals_plain_softmax() -> None:
    q, k, v = random_inputs(7)
    out = np.asarray(causal_attention(q, k, v))
    for token in range(7):
        for head in range(4):
            keys, values = (np.asarray(x, np.float64)[: token + 1, head // 2] for x in (k, v))
            weights = np.exp(keys @ np.asarray(q, np.float64)[token, head] * 8**-0.5)
            np.testing.assert_allclose(out[token, head], weights @ values / weights.sum(), atol=1e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_leading_axes_are_rows(lead: tuple[int, ...]) -> None:
    q, k, v = random_inputs(*lead, 5)
    by_row = AttentionVariant(score_mod=lambda s, row, h, qp, kp: s * (row + 1))
    out = causal_attention(q, k, v, variant=by_row)
    assert out.shape == q.shape
    flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v, out)]
    for row in range(len(flat[0])):
        scaled = AttentionVariant(scale=8**-0.5 * (row + 1))
        alone = causal_attention(*(x[row] for x in flat[:3]), variant=scaled)
        np.testing.assert_allclose(flat[3][row], alone, atol=1e-6, rtol=0)


def test_the_future_has_no_influence() -> None:
    q, k, v = random_inputs(6)
    changed = causal_attention(q, k.at[4:].set(9.0), v.at[4:].set(-9.0))
    np.testing.assert_array_equal(changed[:4], causal_attention(q, k, v)[:4])


def test_gradients_are_finite_where_everything_is_masked() -> None:
    q, k, v = random_inputs(6)
    variant = AttentionVariant(mask_mod=lambda r, h, qp, kp: qp > 2, logit_soft_cap=5.0)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (causal_attention(q, k, v, variant=variant) ** 2).sum()

    out = causal_attention(q, k, v, variant=variant)
    np.testing.assert_array_equal(out[:3], 0.0)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)
    np.testing.assert_array_equal(gradients[0][:3], 0.0)
    step = 1e-2
    direction = jnp.ones_like(v)
    numeric = (loss(q, k, v + step * direction) - loss(q, k, v - step * direction)) / (2 * step)
    np.testing.assert_allclose(numeric, (gradients[2] * direction).sum(), rtol=1e-2)


def test_low_precision_stays_low() -> None:
    q, k, v = (x.astype(jnp.bfloat16) for x in random_inputs(9))
    out = causal_attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    exact = causal_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    # Weights and outputs are rounded to 8 bits, each at most 2**-9 of a value of order one.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=2**-6, rtol=0)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((5, 4, 8), (5, 2, 8), (5, 1, 8)),
        ((5, 4, 8), (6, 2, 8), (6, 2, 8)),
        ((5, 4, 8), (5, 2, 16), (5, 2, 16)),
        ((5, 4, 8), (5, 3, 8), (5, 3, 8)),
    ],
)
def test_shapes_that_do_not_fit(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="causal_attention: "):
        causal_attention(jnp.zeros(q), jnp.zeros(k), jnp.zeros(v))

"""The cutoff by bisection against a sort, on hostile logits."""

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.sampler_cutoff import kept_cutoff

compiled = jax.jit(kept_cutoff)
VOCAB = 24
# XLA flushes subnormal numbers to zero, so they are ties with it.
values = st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False) | st.sampled_from(
    [-np.inf, 0.0, -0.0, 1.0, 1.0000001, -5.0, 3e38, -3e38]
)
rows = st.lists(values, min_size=VOCAB, max_size=VOCAB).filter(lambda row: max(row) > -np.inf)


def cutoff(logits: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> float:
    one = np.ones(1, np.float32)
    row_max = logits.max(keepdims=True)
    found = compiled(logits[None], row_max, one, np.array([top_k], np.int32), one * top_p, one * min_p)
    return float(found[0])


@given(rows, st.integers(-1, VOCAB + 3))
def test_top_k_is_exact(row: list[float], top_k: int) -> None:
    logits = np.array(row, np.float32)
    kept = logits >= cutoff(logits, max(top_k, 0))
    expected = np.ones(VOCAB, bool) if top_k <= 0 else logits >= np.sort(logits)[-min(top_k, VOCAB)]
    finite = logits > -np.inf
    np.testing.assert_array_equal(kept & finite, expected & finite)


@given(st.lists(st.integers(0, 40), min_size=VOCAB, max_size=VOCAB), st.integers(1, 99))
def test_top_p_keeps_the_smallest_set_that_reaches_it(row: list[int], percent: int) -> None:
    # Weights that are powers of two sum exactly, so there is no rounding to hide behind.
    logits = np.array(row, np.float32) * np.float32(-0.25 * np.log(2.0))
    logits -= logits.max()
    weight = np.exp(logits.astype(np.float64))
    kept = logits >= cutoff(logits, top_p=percent / 100)
    share = weight[kept].sum() / weight.sum()
    assert share >= percent / 100 - 1e-5
    smallest = logits[kept].min()
    assert weight[logits > smallest].sum() / weight.sum() < percent / 100 + 1e-5


def test_nothing_is_filtered_when_everything_is_off() -> None:
    logits = np.linspace(-50, 50, VOCAB, dtype=np.float32)
    assert cutoff(logits) == -np.inf
    assert cutoff(logits, top_k=VOCAB) == -np.inf
    assert cutoff(logits, top_k=2**31 - 1) == -np.inf


def test_the_best_token_always_stays() -> None:
    logits = np.linspace(-50, 50, VOCAB, dtype=np.float32)
    assert cutoff(logits, top_p=1e-30) == 50.0
    assert cutoff(logits, min_p=1.0) == 50.0
    assert cutoff(np.zeros(VOCAB, np.float32), top_p=0.01) == 0.0  # ties are kept


def test_long_rows() -> None:
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=100_000)).astype(np.float32)
    weight = np.exp(logits.astype(np.float64))
    for top_p in (0.1, 0.5, 0.9, 0.99, 0.9999):
        kept = logits >= cutoff(logits, top_p=top_p)
        share = weight[kept].sum() / weight.sum()
        assert abs(share - top_p) < 1e-5 + weight[kept].min() / weight.sum()
    for top_k in (1, 50, 5000, 99_999):
        assert (logits >= cutoff(logits, top_k=top_k)).sum() == (logits >= np.sort(logits)[-top_k]).sum()

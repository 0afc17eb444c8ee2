"""Splitting a user's function: what is hoisted over which axes, and that the halves make the whole again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpaged.pallas_kernels.hoisting import AXES, SplitMod, split_mod

Mod = Callable[..., Any]

B, H, Q, K = 2, 3, 5, 8
INDICES = (
    np.arange(B, dtype=np.int32).reshape(B, 1, 1, 1),
    np.arange(H, dtype=np.int32).reshape(1, H, 1, 1),
    np.asarray([0, 1, 4, 6, 9], np.int32).reshape(1, 1, Q, 1),
    np.arange(K, dtype=np.int32).reshape(1, 1, 1, K),
)
SHAPE = (B, H, Q, K)
SCORES = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32) * 4

rng = np.random.default_rng(1)
SLOPES = np.exp2(-np.arange(1.0, H + 1)).astype(np.float32)
DOCUMENTS = np.repeat(np.arange(4, dtype=np.int32), 3)  # [positions]
ROW_DOCUMENTS = np.stack([DOCUMENTS, DOCUMENTS // 2]).astype(np.int8)  # [B, positions]
PREFIX = np.asarray([3, 6], np.int32)  # [B]
BASE = np.asarray([1, 3], np.int32)  # [B]
TREE = rng.random((B, 12, 12)) < 0.5
TREE_BITS = rng.integers(0, 2**32, (B, 12), dtype=np.uint32)
T5 = rng.normal(size=(8, H)).astype(np.float32)
TEMPERATURE = jnp.float32(1.7)
HEAD_SCALE = np.linspace(0.5, 2, H, dtype=np.float16)


def t5_bucket(distance: Any) -> Any:
    """Raffel et al. 2020: half of the buckets exact, the other half logarithmic up to 16."""
    far = 4 + (jnp.log(jnp.maximum(distance, 1) / 4) / jnp.log(16 / 4) * 4).astype(jnp.int32)
    return jnp.where(distance < 4, distance, jnp.minimum(far, 7))


def alibi(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
    return s - jnp.asarray(SLOPES)[h] * (q - k)


def t5(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
    return s + jnp.asarray(T5)[t5_bucket(jnp.maximum(q - k, 0)), h]


def tree(r: Any, h: Any, q: Any, k: Any) -> Any:
    base = jnp.asarray(BASE)[r]
    inside = jnp.asarray(TREE)[r, jnp.clip(q - base, 0, 11), jnp.clip(k - base, 0, 11)]
    return (k < base) | inside


def tree_bits(r: Any, h: Any, q: Any, k: Any) -> Any:
    return (jnp.asarray(TREE_BITS)[r, q] >> k.astype(jnp.uint32)) & 1 == 1


@jax.jit
def nested(s: Any, h: Any) -> Any:
    return jax.jit(lambda x: x * jnp.asarray(SLOPES)[h])(jax.nn.relu(s)) + jnp.where(s > 0, s, -s)


def learned(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
    return s / TEMPERATURE + 1 / jnp.asarray(HEAD_SCALE)[h]


def looped(r: Any, h: Any, q: Any, k: Any) -> Any:
    count = lax.fori_loop(0, q, lambda i, total: total + jnp.asarray(DOCUMENTS)[i], 0)
    return count >= k


def branches(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
    s = lax.cond(k > 2, lambda: s + jnp.asarray(SLOPES)[h], lambda: s)
    return lax.switch(h, [lambda x: x, lambda x: 2 * x, lambda x: x + 1], s)


def twice(r: Any, h: Any, q: Any, k: Any) -> Any:
    table = jnp.asarray(DOCUMENTS)
    return (table[q] == table[k]) & (table[q] > 0) | (table[k] == 2)


def smooth(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
    x = jax.nn.softplus(s) + jax.nn.sigmoid(s) + jax.nn.gelu(s) + jax.nn.gelu(s, approximate=False)
    return x + jax.nn.elu(s) + jax.nn.silu(s) + jnp.exp(s / 8) + jnp.log1p(jnp.abs(s)) + jnp.log2(1 + s * s)


def powers(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
    x = jnp.abs(s) + 0.5
    return x**0.5 + x**-0.5 + x**1.7 + s**3 + s**-2 + jnp.square(s) + 0.96 ** (q - k) + 2.0**s + s**0


def rounded(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
    x = jnp.floor(s) + 2 * jnp.ceil(s) + jnp.round(s) * 4 + jnp.sign(s) + jnp.clip(s, -1, 1) + jnp.sign(k - 3)
    return jnp.where(jnp.isfinite(x) & ~jnp.isnan(s), x, 0) + (s > 1) + s.astype(jnp.int32)


def bits(r: Any, h: Any, q: Any, k: Any) -> Any:
    mixed = (q << k) ^ (k >> 1) | lax.shift_right_logical(~q, k) & lax.shift_left(q, k * 9)
    return (mixed.astype(bool) == (q > k)) | (jnp.maximum(q > k, h > 1) != (jnp.minimum(k, q) < 2))


def divided(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
    a, b = q - k, k - 3
    return s + (a // 3 + 10 * (a % 3) + a // b * 100 + a % b * 1000 + lax.div(a, b) - lax.rem(a, b))


@dataclass(frozen=True)
class Case:
    mod: Mod
    axes: list[str]  # of what is hoisted, by initials
    takes_score: bool = True


MASK = {"takes_score": False}
CASES = {
    "identity": Case(lambda s, r, h, q, k: s, []),
    "constant": Case(lambda r, h, q, k: True, [], **MASK),
    "constant_score": Case(lambda s, r, h, q, k: 3, []),
    "alibi": Case(alibi, ["h"]),
    "t5": Case(t5, ["hqk"]),
    "documents": Case(
        lambda r, h, q, k: jnp.asarray(DOCUMENTS)[q] == jnp.asarray(DOCUMENTS)[k], ["q", "k"], **MASK
    ),
    "row_documents": Case(
        lambda r, h, q, k: jnp.asarray(ROW_DOCUMENTS)[r, q] == jnp.asarray(ROW_DOCUMENTS)[r, k],
        ["rq", "rk"],
        **MASK,
    ),
    "prefix": Case(lambda r, h, q, k: (k <= q) | (k < jnp.asarray(PREFIX)[r]), ["r"], **MASK),
    "tree": Case(tree, ["rqk"], **MASK),
    "tree_bits": Case(tree_bits, ["rq"], **MASK),
    "soft_cap": Case(lambda s, r, h, q, k: 5 * jnp.tanh(s / 5), []),
    "dilated": Case(lambda r, h, q, k: ((q - k) % 3 == 0) | ((q - k) // 4 == -1), [], **MASK),
    "nested": Case(lambda s, r, h, q, k: nested(s, h), ["h"]),
    "learned": Case(learned, ["", "h"]),
    "looped": Case(looped, ["q"], **MASK),
    "branches": Case(branches, ["h"]),
    "twice": Case(twice, ["q", "k"], **MASK),
    "reduced": Case(lambda s, r, h, q, k: s + jnp.asarray(T5)[:, h].max(), ["h"]),
    "sines": Case(lambda s, r, h, q, k: s * jnp.sin(q * 0.1), ["q"]),
    "table": Case(lambda s, r, h, q, k: jnp.asarray(T5)[k, h] * TEMPERATURE + 1 + s, ["hk"]),
    "precision": Case(lambda s, r, h, q, k: s.astype(jnp.bfloat16) + jnp.asarray(HEAD_SCALE)[h], ["h"]),
    "smooth": Case(smooth, []),
    "powers": Case(powers, []),
    "rounded": Case(rounded, []),
    "bits": Case(bits, [], **MASK),
    "divided": Case(divided, []),
}


def initials(split: SplitMod) -> list[str]:
    return ["".join(axis[0] for axis in hoisted.axes) for hoisted in split.hoisted]


def recombined(split: SplitMod, scores: Any) -> jax.Array:
    loaded = [jnp.broadcast_to(hoisted.evaluate(*INDICES), SHAPE) for hoisted in split.hoisted]
    return split.inline(loaded, scores, *(jnp.broadcast_to(index, SHAPE) for index in INDICES))


def plain(case: Case, scores: Any) -> jax.Array:
    arguments = (scores, *INDICES) if case.takes_score else INDICES
    return jnp.vectorize(case.mod)(*arguments)


@pytest.mark.parametrize("name", CASES)
def test_the_halves_make_the_whole(name: str) -> None:
    case = CASES[name]
    split = split_mod(case.mod, case.takes_score)
    assert initials(split) == case.axes
    for hoisted in split.hoisted:
        value = hoisted.evaluate(*INDICES)
        assert value.dtype == hoisted.dtype
        assert hoisted.dtype in (jnp.float32, jnp.int32)
        sizes = zip(AXES, SHAPE, strict=True)
        assert value.shape == (tuple(n if a in hoisted.axes else 1 for a, n in sizes) if hoisted.axes else ())
    found = jax.jit(lambda scores: recombined(split, scores))(SCORES if case.takes_score else None)
    expected = jnp.broadcast_to(plain(case, SCORES), SHAPE)
    assert found.dtype == (jnp.float32 if case.takes_score else jnp.bool_)
    tolerance = 0.05 if name == "precision" else 2e-6  # the kernel computes in float32 throughout
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)

"""Splitting a user's function: what is hoisted over which axes, and that the halves make the whole again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpaged.pallas_kernels import AttentionVariant
from jaxpaged.pallas_kernels.hoisting import AXES, SplitMod, accurate_tanh, split_mod
from jaxpaged.pallas_kernels.mosaic_gpu import kernel, store_global
from tests.pallas_kernels.interpreter import interpreter

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
    "minus_infinity": Case(lambda s, r, h, q, k: jnp.where(k > q + 2, -jnp.inf, s), []),
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


def plain(mod: Mod, takes_score: bool, scores: Any = SCORES, indices: Any = INDICES) -> jax.Array:
    return jax.jit(jnp.vectorize(mod))(*(scores,) * takes_score, *indices)


def check(found: Any, name: str, expected: Any) -> None:
    tolerance = 0.05 if name == "precision" else 2e-6  # a kernel computes in float32 throughout
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_halves_make_the_whole(name: str) -> None:
    case = CASES[name]
    split = split_mod(case.mod, case.takes_score)
    assert initials(split) == case.axes
    for hoisted in split.hoisted:
        value = jax.eval_shape(hoisted.evaluate, *INDICES)
        assert value.dtype == hoisted.dtype
        assert hoisted.dtype in (jnp.float32, jnp.int32)
        sizes = zip(AXES, SHAPE, strict=True)
        assert value.shape == (tuple(n if a in hoisted.axes else 1 for a, n in sizes) if hoisted.axes else ())
    found = jax.jit(lambda scores: recombined(split, scores))(SCORES if case.takes_score else None)
    assert found.dtype == (jnp.float32 if case.takes_score else jnp.bool_)
    check(found, name, plain(case.mod, case.takes_score))


def test_values_are_evaluated_over_indices_of_any_rank() -> None:
    [hoisted] = split_mod(t5, True).hoisted
    one, q, k = jnp.int32(1), jnp.arange(4), jnp.arange(6).reshape(2, 3, 1)
    value = jax.jit(hoisted.evaluate)(None, one, q, k)
    assert value.shape == (2, 3, 4)
    np.testing.assert_array_equal(value[1, 0], jax.jit(hoisted.evaluate)(one, one, q, jnp.int32(3)))


def test_arrays_of_an_outer_program_stay_traced() -> None:
    traces = 0

    @jax.jit
    def outer(table: jax.Array, temperature: jax.Array, documents: jax.Array) -> Any:
        nonlocal traces
        traces += 1
        score = split_mod(lambda s, r, h, q, k: s * temperature + table[h] * (q - k), True)
        mask = split_mod(lambda r, h, q, k: documents[q] == documents[k], False)
        assert initials(score) + initials(mask) == ["", "h", "q", "k"]
        return recombined(score, SCORES), recombined(mask, None)

    for scale in (1, 2):
        table, documents = SLOPES * scale, DOCUMENTS // scale
        scores, mask = outer(table, np.float32(scale), documents)
        distance = INDICES[2] - INDICES[3]
        np.testing.assert_allclose(
            scores, SCORES * scale + table.reshape(1, H, 1, 1) * distance, atol=1e-5, rtol=0
        )
        expected = documents[INDICES[2]] == documents[INDICES[3]]
        np.testing.assert_array_equal(mask, np.broadcast_to(expected, SHAPE))
    assert traces == 1


def test_a_mod_may_close_over_a_shard() -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(slopes: jax.Array, scores: jax.Array) -> jax.Array:
        split = split_mod(lambda s, r, h, q, k: jnp.tanh(s) + slopes[h] * (q - k), True)
        assert initials(split) == ["h"]
        return recombined(split, scores)

    shard, whole = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()
    found = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(shard, whole), out_specs=shard))(SLOPES, SCORES)
    expected = np.tanh(SCORES) + SLOPES.reshape(1, H, 1, 1) * (INDICES[2] - INDICES[3])
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["nested", "t5", "branches", "learned", "tree", "prefix"])
def test_bound_variants_split_alike(name: str) -> None:
    case = CASES[name]
    field = "score_mod" if case.takes_score else "mask_mod"
    spec, operands = AttentionVariant(**{field: case.mod}).split()

    @jax.jit
    def outer(operands: Any) -> jax.Array:
        split = split_mod(getattr(spec.bind(operands), field), case.takes_score)
        assert sorted(initials(split)) == sorted(case.axes)
        return recombined(split, SCORES if case.takes_score else None)

    check(outer(operands), name, plain(case.mod, case.takes_score))


def while_score(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
    return lax.while_loop(lambda x: x > 1, lambda x: x / 2, s)


@pytest.mark.parametrize(
    ("mod", "message"),
    [
        (
            lambda s, r, h, q, k: s + jnp.asarray(SLOPES)[s.astype(jnp.int32)],
            "array indexing may not depend on the score, and dynamic_slice does",
        ),
        (
            lambda s, r, h, q, k: jnp.stack([s, 2 * s]).max(),
            "array indexing may not depend on the score",
        ),
        (while_score, "control flow may not depend on the score, and while does"),
        (
            lambda s, r, h, q, k: lax.fori_loop(0, 3, lambda i, x: x + k, s),
            "control flow may not depend on the score, and scan does",
        ),
        (lambda s, r, h, q, k: jnp.sin(s), "sin of float32 may not depend on the score"),
        (lambda s, r, h, q, k: s % 2.5, "rem of float32, float32 may not depend on the score"),
        (lambda s, r, h, q, k: s ** jnp.asarray(SLOPES)[h], "pow of float32, float32 may not"),
    ],
)
def test_what_the_score_may_not_do(mod: Mod, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        split_mod(mod, True)


def test_what_is_not_used_is_not_refused() -> None:
    def mod(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
        jnp.sin(s) + jnp.asarray(SLOPES)[h]
        return s

    assert split_mod(mod, True).hoisted == ()


def test_a_mod_returns_one_scalar() -> None:
    with pytest.raises(ValueError, match="must return one scalar"):
        split_mod(lambda r, h, q, k: jnp.arange(3) < q, False)


def test_tanh_is_accurate_everywhere() -> None:
    x = np.concatenate([np.linspace(-12, 12, 9999), np.geomspace(1e-30, 3e38, 99), [0, np.inf, -np.inf]])
    x = x.astype(np.float32)
    np.testing.assert_allclose(accurate_tanh(jnp.asarray(x)), np.tanh(x, dtype=np.float64), atol=2e-7, rtol=0)
    assert np.isnan(accurate_tanh(jnp.float32(np.nan)))


@pytest.mark.parametrize(
    "mod", [jax.nn.sigmoid, jnp.log1p, jnp.expm1, lax.erf, lax.erfc, jnp.floor, jnp.ceil, jnp.round, jnp.sign]
)
def test_rewritten_functions_agree_at_the_edges(mod: Mod) -> None:
    x = np.asarray(
        [0, 1e-8, 1e-3, 0.2, 0.25, 0.3, 0.5, 0.99999994, 1, 1.5, 2.5, 7.25, 2**23 - 0.5, 2**24, 1e30]
    )
    x = np.concatenate([x, [np.inf, np.nan], -x, [-np.inf]]).astype(np.float32)
    found = split_mod(lambda s, r, h, q, k: mod(s), True).inline([], jnp.asarray(x), 0, 0, 0, 0)
    np.testing.assert_allclose(found, mod(x), rtol=2e-6, atol=2e-7)


TILE = (16, 64)
TILE_INDICES = (*INDICES[:2], np.arange(16).reshape(1, 1, 16, 1), np.arange(64).reshape(1, 1, 1, 64))


def run_in_kernel(case: Case, scores: jax.Array, interpret: Any = None) -> jax.Array:
    """A tile a thread block: scores and hoisted values come from global memory, row and head are scalars."""
    split = split_mod(case.mod, case.takes_score)

    def body(*refs: Any) -> None:
        row, head = lax.axis_index("row"), lax.axis_index("head")
        layout = plgpu.Layout.MMA_ACC(jnp.bfloat16, m_warps=1)
        score, *loaded = [plgpu.load(r.at[row, head], layout=layout, optimized=False) for r in refs[:-1]]
        q, k = (plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, TILE, n), layout) for n in (0, 1))
        out = split.inline(loaded, score if case.takes_score else None, row, head, q, k)
        store_global(refs[-1].at[row, head], out.astype(jnp.float32))

    shape = (B, H, *TILE)
    tiles = [jnp.broadcast_to(hoisted.evaluate(*TILE_INDICES), shape) for hoisted in split.hoisted]
    out_type = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = kernel(
        "test", body, interpret=interpret, out_type=out_type, grid=(B, H), grid_names=("row", "head")
    )
    return call(scores, *tiles)


TILE_SCORES = np.random.default_rng(2).normal(size=(B, H, *TILE)).astype(np.float32)


@pytest.mark.parametrize("name", ["branches", "tree_bits"])
def test_kernels_inline_it(name: str) -> None:
    case = CASES[name]
    with interpreter() as interpret:
        found = np.asarray(jax.jit(lambda x: run_in_kernel(case, x, interpret))(TILE_SCORES))
    check(found, name, plain(case.mod, case.takes_score, TILE_SCORES, TILE_INDICES))


@pytest.mark.parametrize("name", CASES)
def test_mosaic_gpu_lowers_it(name: str) -> None:
    """Layouts are inferred and instructions chosen; there need be no GPU for that."""
    traced = jax.jit(lambda x: run_in_kernel(CASES[name], x)).trace(TILE_SCORES)
    assert traced.lower(lowering_platforms=("cuda",)).as_text()

"""Attention variants: what is structure, what is data, and what is refused."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpaged.pallas_kernels.variant as variant_module
from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant, KVPool, paged_attention
from jaxpaged.pallas_kernels.paged_attention.cases import Case, alibi, make_inputs
from jaxpaged.pallas_kernels.variant import VariantSpec
from tests.pallas_kernels.oracle import compiled, softmax_attention

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def unchecked() -> type[AttentionVariant]:
    """The class as users have it: the suite's own type checks would refuse some of these values earlier."""
    assert variant_module.__file__ is not None
    spec = importlib.util.spec_from_file_location("unchecked_variant", variant_module.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.AttentionVariant


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("scale", "logit_soft_cap")
            for value in (0.0, -1.0, NAN, INF, "1", True)
        ),
        *(("sliding_window", value) for value in (0, -4, 2.5, NAN, "8", True)),
        ("score_mod", 3.0),
        ("mask_mod", "causal"),
    ],
)
def test_a_bad_field_is_named_with_its_value(
    unchecked: type[AttentionVariant], name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"AttentionVariant: {name}={value!r} must be"):
        unchecked(**{name: value})


def test_numbers_of_numpy_are_numbers(unchecked: type[AttentionVariant]) -> None:
    variant = unchecked(scale=np.float32(0.5), sliding_window=np.int64(4))  # type: ignore[arg-type]
    assert variant.scale_for(64) == 0.5
    assert AttentionVariant().scale_for(64) == 0.125


@pytest.mark.parametrize(
    ("name", "mod"),
    [
        ("score_mod", lambda s, r, h, q, k: jnp.stack([s, s])),
        ("score_mod", lambda s, r, h, q, k: (s, s)),
        ("mask_mod", lambda r, h, q, k: jnp.arange(3) < q),
    ],
    ids=["vector", "pair", "mask_vector"],
)
def test_a_mod_returns_one_scalar(name: str, mod: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=f"{name} must return one scalar"):
        AttentionVariant(**{name: mod}).split()


def table_bias(table: Any) -> AttentionVariant:
    return AttentionVariant(score_mod=lambda s, r, h, q, k: s + jnp.asarray(table)[h])


def two_tables(first: Any, second: Any, sinks: Any) -> AttentionVariant:
    """Both mods close over arrays, and there are sinks besides."""
    return AttentionVariant(
        sinks=jnp.asarray(sinks),
        score_mod=lambda s, r, h, q, k: s * jnp.asarray(first)[h],
        mask_mod=lambda r, h, q, k: jnp.asarray(second)[k] <= jnp.asarray(second)[q],
    )


def looped(table: Any) -> AttentionVariant:
    def mod(s: Any, r: Any, h: Any, q: Any, k: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda i, x: x + jnp.asarray(table)[i], s)

    return AttentionVariant(score_mod=mod)


ONE, OTHER = np.linspace(0, 1, 4, dtype=np.float32), np.linspace(3, 9, 4, dtype=np.float32)


@pytest.mark.parametrize("make", [table_bias, looped, lambda t: two_tables(t, t, t)])
def test_new_values_are_the_same_structure(make: Callable[[Any], AttentionVariant]) -> None:
    (spec, arrays), (other_spec, other_arrays) = make(ONE).split(), make(OTHER).split()
    assert spec == other_spec
    assert hash(spec) == hash(other_spec)
    assert len(arrays) == len(other_arrays) > 0
    assert any((a != b).any() for a, b in zip(arrays, other_arrays, strict=True))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (AttentionVariant(), AttentionVariant(scale=0.5)),
        (AttentionVariant(), AttentionVariant(sinks=jnp.zeros(4))),
        (AttentionVariant(sliding_window=4), AttentionVariant(sliding_window=5)),
        (table_bias(ONE), table_bias(np.zeros(5, np.float32))),
        (table_bias(ONE), table_bias(np.zeros(4, np.int32))),
        (
            AttentionVariant(score_mod=lambda s, r, h, q, k: s * 0.1),
            AttentionVariant(score_mod=lambda s, r, h, q, k: s * 0.10000001),
        ),
        (
            AttentionVariant(mask_mod=lambda r, h, q, k: q - k < 4),
            AttentionVariant(mask_mod=lambda r, h, q, k: q - k < 5),
        ),
        (
            AttentionVariant(mask_mod=lambda r, h, q, k: q == k),
            AttentionVariant(mask_mod=lambda r, h, q, k: q == h),
        ),
    ],
)
def test_other_structures_differ(one: AttentionVariant, other: AttentionVariant) -> None:
    assert one.split()[0] != other.split()[0]


def jitted_inside(table: np.ndarray, scale: float = 1.0) -> AttentionVariant:
    """The array is held by a trace inside of the mod's trace, in a branch at that."""

    @jax.jit
    def bias(score: jax.Array, head: jax.Array) -> jax.Array:
        return score * scale + jnp.asarray(table)[head]

    return AttentionVariant(
        score_mod=lambda s, r, h, q, k: jax.lax.cond(k > 2, lambda: bias(s, h), lambda: s)
    )


def test_arrays_of_jitted_functions_are_not_mistaken_for_each_other() -> None:
    one, same, other = (jitted_inside(table).split()[0] for table in (ONE, ONE.copy(), OTHER))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one != jitted_inside(ONE, 2.0).split()[0]


CASE = Case("variant", ((0, 9), (12, 1)), head_dim=16, block_size=4)


@pytest.mark.parametrize("name", ["reference", "xla"])
@pytest.mark.parametrize(
    "variant", [alibi(4), two_tables(ONE, np.arange(20, dtype=np.int32) // 3, OTHER), jitted_inside(OTHER)]
)
def test_binding_what_was_split_is_the_same_variant(name: str, variant: AttentionVariant) -> None:
    inputs = make_inputs(CASE)
    spec, arrays = variant.split()
    bound = spec.bind(arrays)
    assert bound.split()[0] == spec
    np.testing.assert_array_equal(compiled(name, 0, bound)(*inputs), compiled(name, 0, variant)(*inputs))


def test_new_values_do_not_compile_again() -> None:
    traces = 0

    def call(
        q: jax.Array, pool: KVPool, batch: AttentionBatch, spec: VariantSpec, arrays: tuple[jax.Array, ...]
    ) -> jax.Array:
        nonlocal traces
        traces += 1
        return paged_attention(q, pool, 0, batch, variant=spec.bind(arrays), implementation="xla")

    jitted = jax.jit(call, static_argnums=3)
    inputs = make_inputs(CASE)
    documents = np.arange(20, dtype=np.int32)
    for first, second, sinks in (
        (ONE, documents, OTHER),
        (OTHER, documents // 4, ONE),
        (ONE, documents // 9, ONE),
    ):
        variant = two_tables(first, second, sinks)
        expected = softmax_attention(inputs[0], inputs[1], 0, inputs[2], variant)
        found = jitted(*inputs, *variant.split())
        np.testing.assert_allclose(found[: len(expected)], expected, atol=2e-5, rtol=0)
    assert traces == 1

"""The attention kernel on a GPU: every case, both low precisions, all forms, against float64.

The rule of the whole suite: the error is at most twice that of the plain reference in the same precision.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import AttentionBatch, AttentionVariant, KVPool
from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case, make_inputs
from tests.gpu.kernel import CONFIGS, DETERMINISTIC_FORMS, SUPPORTED_CASES, Inputs, attend, forms, require
from tests.pallas_kernels import oracle
from tests.pallas_kernels.oracle import one_row, softmax_attention

pytestmark = pytest.mark.gpu

DTYPES = ("bfloat16", "float16")
SEEDS = 24


def by_name(case: Case) -> str:
    return case.name


def truth(case: Case, inputs: Inputs) -> tuple[np.ndarray, float]:
    """float64 results of the real tokens, and the error that is allowed."""
    exact = softmax_attention(inputs[0], inputs[1], 1, inputs[2], case.variant)
    with jax.default_matmul_precision("highest"):  # a GPU's default for float32 products is coarser
        plain = oracle.attend("reference", case, inputs)[: len(exact)]
    return exact, 2 * float(np.abs(plain - exact).max()) + 1e-5


def check(names: Sequence[str], case: Case, inputs: Inputs) -> None:
    exact, allowed = truth(case, inputs)
    for name in names:
        out = attend(name, case, inputs)
        assert np.isfinite(out).all(), f"{name}, padding included"
        assert np.abs(out[: len(exact)] - exact).max() <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SUPPORTED_CASES, ids=by_name)
def test_every_case_in_every_form_whatever_unused_slots_hold(case: Case, dtype: str) -> None:
    """A pool that others use: NaN, and numbers that are large in the dtype."""
    large = 1e30 if dtype == "bfloat16" else 6e4
    for seed, poison in enumerate((np.nan, large)):
        inputs = make_inputs(case, seed, dtype=jnp.dtype(dtype), poison=poison)
        check(forms(), case, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["mma", "wgmma", "prefill"])
def test_random_numbers_again_and_again(form: str, dtype: str) -> None:
    """A race or a missed wait shows on some runs only. Results of one input are the same every time."""
    require(form)
    case = next(case for case in CASES if case.name == "all_at_once")
    for seed in range(SEEDS):
        inputs = make_inputs(case, seed, dtype=jnp.dtype(dtype))
        check([form], case, inputs)
        again = [attend(form, case, inputs) for _ in range(3)]
        for out in again[1:]:
            np.testing.assert_array_equal(out, again[0])


def test_rows_of_very_different_length() -> None:
    """Work is split over the whole chip: the long row's pieces are joined, the short ones' are whole."""
    case = Case(
        "ragged",
        ((12_000, 1), *((17 * i, 1) for i in range(40)), (5_000, 3)),
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        num_layers=2,
    )
    check(["chosen", *forms()], case, make_inputs(case, dtype=jnp.dtype("bfloat16")))


def random_rows(seed: int, tokens: int) -> tuple[tuple[int, int], ...]:
    """Rows that decode, chunks and whole prompts of random lengths, ``tokens`` queries in all."""
    rng, rows = np.random.default_rng(seed), []
    while tokens > 0:
        new = min(tokens, int(rng.choice([1, 1, 1, rng.integers(2, 40), rng.integers(60, 300)])))
        rows.append((int(rng.choice([0, rng.integers(0, 130), rng.integers(0, 800)])), new))
        tokens -= new
    return tuple(rows)


# Groups that fill a tile and that do not, every width, large and small blocks.
SHAPES = (
    (8, 2, 128, 16),
    (6, 2, 64, 32),
    (14, 2, 128, 64),
    (4, 4, 192, 16),
    (4, 1, 256, 128),
    (4, 2, 96, 16),
)


@pytest.mark.parametrize("seed", range(len(SHAPES)))
def test_large_batches_of_random_rows(seed: int) -> None:
    """In all forms and in that which is chosen; with a window on some and sinks on others.

    No larger: the reference gathers a row's table for each of its tokens.
    """
    num_heads, num_kv_heads, head_dim, block_size = SHAPES[seed]
    variant = [AttentionVariant(), AttentionVariant(sliding_window=300)][seed % 2]
    if seed % 3 == 2:
        variant = AttentionVariant(sliding_window=500, sinks=jnp.linspace(-1.0, 3.0, num_heads))
    case = Case(
        "random",
        random_rows(seed, 500),
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        150,
        3,
        variant=variant,
    )
    check(["chosen", *forms()], case, make_inputs(case, seed, dtype=jnp.dtype("bfloat16")))


@pytest.mark.parametrize("case", SUPPORTED_CASES, ids=by_name)
def test_plain_jax_is_right_on_this_device(case: Case) -> None:
    """``xla`` is what the kernel is compared with in benchmarks."""
    inputs = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    exact, allowed = truth(case, inputs)
    out = oracle.attend("xla", case, inputs)
    assert np.abs(out[: len(exact)] - exact).max() <= allowed


@pytest.mark.parametrize("form", DETERMINISTIC_FORMS)
@pytest.mark.parametrize("name", ["plain", "sliding_window", "sinks", "alibi"])
def test_deterministic_rows_have_the_same_bits_in_every_batch(form: str, name: str) -> None:
    require(form)
    variant = Case("plain", ()).variant if name == "plain" else named(name).variant
    rows = ((5_000, 1), (37, 5), (100, 1), (0, 20), (2_500, 1), (3, 1))
    case = Case("company", rows, head_dim=128, variant=variant, padding_tokens=0, padding_rows=0)
    inputs = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    exact, allowed = truth(case, inputs)
    together = attend(form, case, inputs, deterministic=True)
    assert np.abs(together - exact).max() <= allowed
    at = 0
    for row, (_, new) in enumerate(rows):
        alone = attend(form, case, one_row(inputs, row, new, at), deterministic=True)
        np.testing.assert_array_equal(alone, together[at : at + new], err_msg=f"row {row}")
        at += new


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_tokens_have_the_same_bits_alone_and_in_a_chunk() -> None:
    """``deterministic`` also means: however a prompt is cut into steps."""
    case = Case("chunk", ((300, 12),), head_dim=128, padding_tokens=0, padding_rows=0)
    q, pool, batch = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    whole = attend("chosen", case, (q, pool, batch), deterministic=True)
    for token in (0, 5, 11):
        position = int(batch.positions[token])
        single = AttentionBatch(
            batch.block_tables,
            jnp.array([position + 1], jnp.int32),
            jnp.array([0, 1], jnp.int32),
            jnp.zeros(1, jnp.int32),
            batch.positions[token : token + 1],
            batch.slots[token : token + 1],
        )
        out = attend("chosen", case, (q[token : token + 1], pool, single), deterministic=True)
        np.testing.assert_array_equal(out[0], whole[token])


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("form", CONFIGS)
def test_a_pool_of_more_than_two_to_the_31_elements(form: str, num_layers: int) -> None:
    """32,768 blocks: indices of elements and of bytes pass 32 bits. The same bits as in a small pool."""
    require(form)
    free = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    num_blocks, size = 32_768, (8, 128, 128)
    assert num_blocks * np.prod(size) > 2**31
    if free < 2.2 * num_blocks * np.prod(size) * 2:
        pytest.skip(f"{free / 2**30:.0f} GiB of memory, two arrays of 8 GiB needed")
    case = Case("high", ((1000, 1), (300, 2)), 16, 8, 128, 128, 0, 0, num_layers=1)
    q, small, batch = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    expected = attend(form, case, (q, small, batch), 0)
    # Block i of the small pool becomes the i-th last of the large one; everything else is poison.
    last = num_blocks // num_layers - 1
    ids = num_blocks - 1 - jnp.arange(small.num_blocks)

    @jax.jit
    def spread(values: jax.Array) -> jax.Array:
        return jnp.full((num_blocks, *size), jnp.nan, values.dtype).at[ids].set(values)

    large = KVPool(spread(small.k), spread(small.v), num_layers)
    moved = AttentionBatch(**{**vars(batch), "block_tables": last - batch.block_tables})
    out = attend(form, case, (q, large, moved), num_layers - 1)
    np.testing.assert_array_equal(out, expected)

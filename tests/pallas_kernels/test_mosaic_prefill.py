"""The prefill form of the attention kernel in the interpreter: few cases, chosen to go through every path of it.

With two heads to a kv head and 64 dimensions a half of a tile is 32 tokens, and a step is 64 keys.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import AttentionVariant, KVPool
from jaxpaged.pallas_kernels.mosaic_gpu import GpuTarget
from jaxpaged.pallas_kernels.paged_attention.cases import CASES, Case, make_inputs
from jaxpaged.pallas_kernels.paged_attention.mosaic_plan import make_plan
from jaxpaged.pallas_kernels.paged_attention.tuning import MosaicConfig
from tests.pallas_kernels.mosaic import PREFILL, SMALL_GPU, attend_interpreted, check, check_inputs

# 32 to 63 and 64 to 95 in the halves of a tile: the first passes over the second step. 96 to 115: the second has no
# tokens and passes over all. More padding than a tile holds.
HALVES = Case("halves", ((32, 84), (130, 1), (0, 5)), padding_tokens=70)
# Three tiles of 21 tokens, the last of one half.
THREE_HEADS = Case("three_heads", ((50, 100), (130, 1)), num_heads=3, num_kv_heads=1)


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (HALVES, PREFILL),
        (next(case for case in CASES if case.name == "all_at_once"), PREFILL),
        (replace(THREE_HEADS, head_dim=128, block_size=32), replace(PREFILL, tile_kv=128)),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_no_races_and_no_trace_of_what_nobody_owns(case: Case, config: MosaicConfig) -> None:
    check(case, config, detect_races=True)


_ROWS = ((100, 30), (0, 3))


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (
            Case("one_token_a_half", ((70, 3), (0, 2)), num_heads=64, num_kv_heads=1),
            replace(PREFILL, stages=3),
        ),
        (Case("head_dim_96", _ROWS, head_dim=96), PREFILL),
        (Case("head_dim_192", _ROWS, num_heads=1, num_kv_heads=1, head_dim=192, block_size=128), PREFILL),
        (Case("head_dim_256", _ROWS, num_kv_heads=1, head_dim=256, block_size=64), PREFILL),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_sizes(case: Case, config: MosaicConfig) -> None:
    check(case, config, "float16")


def test_what_blocks_before_the_window_hold_does_not_matter() -> None:
    """Nor keys before it in a block that a query sees. A window in which some steps go without a mask, too."""
    window, rows = 200, ((400, 70), (130, 9), (3, 2))
    case = Case("window", rows, block_size=32, variant=AttentionVariant(sliding_window=window))
    q, pool, batch = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    arrays = [np.array(x, np.float32) for x in (pool.k, pool.v)]
    for row, (cached, _) in enumerate(rows):
        for position in range(max(0, cached - window + 1)):
            block = int(batch.block_tables[row, position // case.block_size]) + pool.num_blocks  # in layer 1
            for array in arrays:
                array[block, :, position % case.block_size] = np.nan
    poisoned = KVPool(*(jnp.asarray(x, jnp.bfloat16) for x in arrays), pool.num_layers)
    check_inputs(case, (q, poisoned, batch), replace(PREFILL, stages=3), detect_races=True)


def most_pieces(case: Case, target: GpuTarget, config: MosaicConfig = PREFILL) -> int:
    """Of how many items the result of a tile is joined."""
    batch = make_inputs(case)[2]
    plan = make_plan(
        batch,
        tile_q=2 * (64 * case.num_kv_heads // case.num_heads),
        tile_kv=config.tile_kv,
        sliding_window=case.variant.sliding_window,
        split_budget=target.num_sms // case.num_kv_heads,
        deterministic=False,
        max_len=batch.block_tables.shape[1] * case.block_size,
        in_place=True,
    )
    return int(plan.split_tiles[:, 1].max())


def test_pieces_of_long_rows_make_the_whole() -> None:
    """More pieces than are joined at a time; and one that only the second half sees."""
    variant = AttentionVariant(sinks=jnp.array((0.5, -1.0, 30.0)))
    case = Case("split", ((298, 24), (500, 1)), num_heads=3, num_kv_heads=1, padding_rows=0, variant=variant)
    target = GpuTarget((9, 0), 14, "interpreter")
    assert most_pieces(case, target) == 8
    check(case, PREFILL, target=target, detect_races=True)


_DOCUMENTS = np.repeat(np.arange(40), 7).astype(np.int32)
_BIAS = np.linspace(-2, 2, 4 * 300, dtype=np.float32).reshape(4, 300)


def test_variants_over_arrays() -> None:
    """Of every axis that a value may have. Most pieces of a row show nothing to anyone, and a row sees nothing."""
    case = Case(
        "arrays",
        ((150, 40), (70, 1), (0, 17)),
        variant=AttentionVariant(
            score_mod=lambda s, r, h, q, k: (
                s * jnp.asarray([0.5, 2.0, 1.0, 1.0, 1.0, 1.0])[r]
                + jnp.asarray(_BIAS)[h, q - k]
                + jnp.asarray(_BIAS)[0, k] * jnp.float32(0.5)
                - jnp.asarray(_BIAS)[h, 7] * jnp.asarray(_BIAS)[1, q]
            ),
            mask_mod=lambda r, h, q, k: (jnp.asarray(_DOCUMENTS)[q] == jnp.asarray(_DOCUMENTS)[k]) & (r != 1),
        ),
    )
    check(case, PREFILL, target=GpuTarget((9, 0), 12, "interpreter"))


@pytest.mark.parametrize(
    ("case", "target", "words"),
    [
        (Case("a", _ROWS), GpuTarget((8, 0), 108, "NVIDIA A100"), "config.form='prefill' needs a Hopper GPU"),
        (
            Case("a", _ROWS, head_dim=96, num_heads=6),
            SMALL_GPU,
            "needs heads of a kv head that are multiples of 64",
        ),
    ],
)
def test_what_is_refused(case: Case, target: GpuTarget, words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        attend_interpreted(case, make_inputs(case, dtype=jnp.dtype("bfloat16")), PREFILL, target=target)


def test_no_promise_of_the_same_bits_in_every_batch() -> None:
    case = Case("a", _ROWS)
    inputs = make_inputs(case, dtype=jnp.dtype("bfloat16"))
    with pytest.raises(NotImplementedError, match="which deterministic=True forbids"):
        attend_interpreted(case, inputs, PREFILL, deterministic=True)

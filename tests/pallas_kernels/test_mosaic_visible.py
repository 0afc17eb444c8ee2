"""Tiles of keys that a ``mask_mod`` leaves: those that a query sees, no others, in every item of the plan."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.pallas_kernels import AttentionBatch
from jaxpaged.pallas_kernels.paged_attention import mosaic_plan, mosaic_visible
from jaxpaged.pallas_kernels.paged_attention.cases import Case, make_inputs

TILE_Q, TILE_KV, HEADS = 8, 32, 4


def key_tiles_of_items(plan: mosaic_plan.WorkPlan) -> dict[int, list[int]]:
    """For each tile of queries the tiles of keys that its items read, in their order."""
    found: dict[int, list[int]] = {}
    assert plan.key_tiles is not None
    lists = np.asarray(plan.key_tiles)
    for item in np.asarray(plan.items)[: int(plan.num_items[0])]:
        tile = int(item[mosaic_plan.TILE])
        begin, end = item[mosaic_plan.BEGIN], item[mosaic_plan.END]
        found.setdefault(tile, []).extend(lists[tile, begin:end].tolist())
    return found


def make_batch(seed: int) -> tuple[AttentionBatch, np.ndarray]:
    """Rows of random lengths, and a document number for each row and position."""
    rng = np.random.default_rng(seed)
    rows = tuple((int(rng.integers(0, 200)), int(rng.integers(1, 60))) for _ in range(4))
    _, _, batch = make_inputs(Case("packed", rows))
    shape = batch.block_tables.shape[0], batch.block_tables.shape[1] * 16
    return batch, rng.integers(0, 5, shape).cumsum(1) // 80


@pytest.mark.parametrize("max_values", [2**27, 2**13], ids=["at_once", "in_rounds"])
@pytest.mark.parametrize("in_place", [False, True], ids=["packed", "in_place"])
@pytest.mark.parametrize("window", [None, 50])
def test_items_have_the_tiles_that_a_query_sees(
    window: int | None, in_place: bool, max_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_visible, "_MAX_VALUES", max_values)
    batch, documents = make_batch(seed=max_values % 7)
    max_len, ids = documents.shape[1], jnp.asarray(documents)
    plan = mosaic_plan.make_plan(
        batch,
        tile_q=TILE_Q,
        tile_kv=TILE_KV,
        sliding_window=window,
        split_budget=6,
        deterministic=False,
        max_len=max_len,
        in_place=in_place,
        mask_mod=lambda row, head, q_pos, kv_pos: (ids[row, q_pos] == ids[row, kv_pos]) & (head < 3),
        num_heads=HEADS,
    )
    read, skipped = key_tiles_of_items(plan), 0
    key = np.arange(max_len)
    for item in np.asarray(plan.items)[: int(plan.num_items[0])]:
        row, tile, first, last = (
            int(item[c])
            for c in (mosaic_plan.ROW, mosaic_plan.TILE, mosaic_plan.FIRST_POS, mosaic_plan.LAST_POS)
        )
        seen = np.zeros(max_len, bool)
        for position in range(max(first, 0), last + 1):
            seen |= (key <= position) & (documents[row] == documents[row, position])
        if window is not None:
            seen &= key >= (max(first - window + 1, 0) // TILE_KV) * TILE_KV
        wanted = sorted(set((key[seen] // TILE_KV).tolist()))
        assert sorted(read[tile]) == wanted
        skipped += max(last, 0) // TILE_KV + 1 - len(wanted)
    assert skipped > 0


def test_a_mask_that_hides_all_of_a_tile_leaves_an_item_without_keys() -> None:
    batch, documents = make_batch(seed=0)
    plan = mosaic_plan.make_plan(
        batch,
        tile_q=TILE_Q,
        tile_kv=TILE_KV,
        sliding_window=None,
        split_budget=6,
        deterministic=False,
        max_len=documents.shape[1],
        mask_mod=lambda row, head, q_pos, kv_pos: row != 1,
        num_heads=HEADS,
    )
    items = np.asarray(plan.items)[: int(plan.num_items[0])]
    hidden = items[:, mosaic_plan.ROW] == 1
    length = items[:, mosaic_plan.END] - items[:, mosaic_plan.BEGIN]
    assert hidden.any()
    assert (length[hidden] == 0).all()
    assert (length[~hidden] > 0).all()

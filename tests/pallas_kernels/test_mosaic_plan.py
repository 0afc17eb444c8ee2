"""The work list of the attention kernels: every key of every token once, and evenly."""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpaged.pallas_kernels import AttentionBatch
from jaxpaged.pallas_kernels.paged_attention.mosaic_plan import (
    BEGIN,
    DETERMINISTIC_SPLIT,
    END,
    FIRST_POS,
    LAST_KEY,
    LAST_POS,
    PART,
    ROW,
    TILE,
    TOKEN,
    WorkPlan,
    make_plan,
    max_tiles,
)

MAX_LEN, TOKENS, ROWS = 8192, 64, 12


def batch_of(rows: list[tuple[int, int]]) -> AttentionBatch:
    """A batch padded to one shape, of rows given as (tokens in the cache, query tokens)."""
    starts = np.cumsum([0] + [new for _, new in rows])
    starts = np.concatenate([starts, np.full(ROWS - len(rows), starts[-1])])
    owners = np.concatenate([np.full(new, row) for row, (_, new) in enumerate(rows)])
    positions = np.concatenate([np.arange(cached, cached + new) for cached, new in rows])
    pad = (0, TOKENS - len(owners))
    arrays = (
        np.zeros((ROWS, MAX_LEN // 16)),
        [cached + new for cached, new in rows] + [0] * (ROWS - len(rows)),
        starts,
        np.pad(owners, pad),
        np.pad(positions, pad),
        np.zeros(TOKENS),
    )
    return AttentionBatch(*(jnp.asarray(x, jnp.int32) for x in arrays))


def plan_of(rows: list[tuple[int, int]], **options: object) -> WorkPlan:
    usual = {"tile_q": 4, "tile_kv": 64, "sliding_window": None, "split_budget": 20}
    arguments = usual | {"deterministic": False, "max_len": MAX_LEN} | options
    return make_plan(batch_of(rows), **arguments)  # type: ignore[arg-type]


row_lists = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 9)), min_size=1, max_size=7)


@settings(max_examples=40)
@given(
    rows=row_lists,
    tile_q=st.sampled_from([1, 2, 4, 16]),
    tile_kv=st.sampled_from([32, 64, 128]),
    window=st.sampled_from([None, 1, 64, 700]),
    budget=st.sampled_from([0, 1, 7, 100]),
    deterministic=st.booleans(),
)
def test_every_key_of_every_token_once(
    rows: list[tuple[int, int]],
    tile_q: int,
    tile_kv: int,
    window: int | None,
    budget: int,
    deterministic: bool,
) -> None:
    plan = plan_of(
        rows,
        tile_q=tile_q,
        tile_kv=tile_kv,
        sliding_window=window,
        split_budget=budget,
        deterministic=deterministic,
    )
    items, counts, starts = (np.asarray(x) for x in (plan.items, plan.item_counts, plan.item_starts))
    real = int(plan.num_items[0])
    assert real == counts.sum() <= len(items)
    assert (items[real:, BEGIN] == items[real:, END]).all()
    assert len(counts) == max_tiles(TOKENS, ROWS, tile_q)
    token = 0
    for row, (cached, new) in enumerate(rows):
        for offset in range(new):
            tile, slot = int(plan.token_tiles[token]), int(plan.token_slots[token])
            assert int(plan.tile_tokens[tile, slot]) == token
            assert int(plan.tile_rows[tile]) == row
            assert int(plan.tile_first_pos[tile]) + slot == cached + offset
            mine = items[starts[tile] : starts[tile] + counts[tile]]
            assert (mine[:, ROW] == row).all()
            assert (mine[:, TILE] == tile).all()
            assert (mine[:, FIRST_POS] <= cached + offset).all()
            assert (mine[:, LAST_POS] >= cached + offset).all()
            covered = [k for item in mine for k in range(item[BEGIN], item[END])]
            assert covered == list(range(covered[0], covered[-1] + 1)), "in order and once"
            oldest = 0 if window is None else max(0, cached + offset - window + 1)
            assert covered[0] * tile_kv <= oldest
            assert covered[-1] == mine[0, LAST_POS] // tile_kv
            assert (mine[:, END] > mine[:, BEGIN]).all(), "no item is empty"
            token += 1


def test_a_long_row_among_short_ones_is_spread_over_the_chip() -> None:
    plan = plan_of([(8000, 1)] + [(100, 1)] * 8, split_budget=60)
    items = np.asarray(plan.items)[: int(plan.num_items[0])]
    lengths = items[:, END] - items[:, BEGIN]
    share = -(-lengths.sum() // 60)
    assert lengths.max() <= 2 * share
    assert int(plan.item_counts[0]) > 30
    np.testing.assert_array_equal(plan.item_counts[1:9], 1)


def test_equal_rows_that_fill_the_chip_are_not_split() -> None:
    plan = plan_of([(4000, 1)] * 12, split_budget=11)
    np.testing.assert_array_equal(plan.item_counts[:12], 1)


@settings(max_examples=40)
@given(rows=row_lists, extra=row_lists)
def test_deterministic_cuts_depend_on_the_row_alone(
    rows: list[tuple[int, int]], extra: list[tuple[int, int]]
) -> None:
    alone, together = (plan_of(r, deterministic=True) for r in (rows[:1], (rows[:1] + extra)[:ROWS][:6]))
    count = int(alone.item_counts[0])
    assert count == int(together.item_counts[0])
    np.testing.assert_array_equal(alone.items[:count], together.items[:count])
    inner = np.asarray(alone.items)[1:count, BEGIN] * 64
    assert (inner % DETERMINISTIC_SPLIT == 0).all()


@pytest.mark.parametrize(
    ("tokens", "rows", "tile_q", "expected"), [(64, 64, 4, 64), (64, 1, 4, 17), (1, 8, 16, 1)]
)
def test_bound_of_tiles(tokens: int, rows: int, tile_q: int, expected: int) -> None:
    assert max_tiles(tokens, rows, tile_q) == expected


@cache
def planned_in_place(tile_q: int, window: int | None, budget: int) -> Callable[[AttentionBatch], WorkPlan]:
    """Compiled once for all batches."""
    options = {"tile_q": tile_q, "sliding_window": window, "split_budget": budget, "in_place": True}
    return jax.jit(partial(make_plan, tile_kv=64, deterministic=False, max_len=MAX_LEN, **options))


@given(
    rows=row_lists,
    sizes=st.sampled_from([(1, None, 7), (4, None, 0), (4, 700, 100), (16, 1, 7), (16, None, 1)]),
)
def test_in_place_every_token_is_written_once(
    rows: list[tuple[int, int]], sizes: tuple[int, int | None, int]
) -> None:
    """By the one item of its tile, or by the join of several, whose partial results have places of their own."""
    tile_q, _, budget = sizes
    plan = planned_in_place(*sizes)(batch_of(rows))
    items = np.asarray(plan.items)
    real = items[: int(plan.num_items[0])]
    assert len(real) <= len(items) == max_tiles(TOKENS, ROWS + 1, tile_q) + budget
    lengths = items[:, END] - items[:, BEGIN]
    assert (np.diff(lengths[: len(real)]) <= 0).all(), "the longest first"
    assert (lengths[len(real) :] == 0).all()
    written = np.zeros(TOKENS, int)
    for item in real[real[:, PART] < 0]:
        written[item[TOKEN] : item[TOKEN] + item[LAST_POS] - item[FIRST_POS] + 1] += 1
    parts = real[real[:, PART] >= 0]
    assert sorted(parts[:, PART]) == list(range(len(parts)))
    assert len(parts) <= max(budget, 0)
    num_joined = 0
    for first, count, token, size in np.asarray(plan.split_tiles):
        if count == 0:
            continue
        mine = parts[(parts[:, PART] >= first) & (parts[:, PART] < first + count)]
        mine = mine[np.argsort(mine[:, PART])]
        assert len(mine) == count >= 2
        assert len(set(mine[:, TILE])) == 1
        assert (mine[:, TOKEN] == token).all()
        assert (mine[:, LAST_POS] - mine[:, FIRST_POS] + 1 == size).all()
        np.testing.assert_array_equal(mine[1:, BEGIN], mine[:-1, END], err_msg="in the order of the keys")
        written[token : token + size] += 1
        num_joined += count
    assert num_joined == len(parts), "all are joined"
    np.testing.assert_array_equal(written, 1, err_msg="padding too")


@settings(max_examples=5)
@given(rows=row_lists)
def test_in_place_the_same_keys_are_read(rows: list[tuple[int, int]]) -> None:
    """By the same items in another order; padding's come last and read none."""
    plans = plan_of(rows, split_budget=7), planned_in_place(4, None, 7)(batch_of(rows))
    expected, found = (np.asarray(plan.items)[: int(plan.num_items[0])] for plan in plans)
    padding = found[found[:, LAST_KEY] < 0]
    assert len(padding) == -(-(TOKENS - sum(new for _, new in rows)) // 4)
    assert (padding[:, END] == 0).all()
    assert (padding[:, BEGIN] == 0).all()
    own = found[found[:, LAST_KEY] >= 0]
    columns = [ROW, TILE, FIRST_POS, LAST_POS, BEGIN, END, LAST_KEY]
    np.testing.assert_array_equal(np.unique(own[:, columns], axis=0), np.unique(expected[:, columns], axis=0))
    lasts = [cached + new - 1 for cached, new in rows]
    np.testing.assert_array_equal(own[:, LAST_KEY], np.asarray(lasts)[own[:, ROW]])

"""Which layers share block tables."""

from collections import Counter

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxpaged.kv_layout import MAX_WASTE, KVLayout


def pattern(period: int, window: int, num_layers: int) -> list[int | None]:
    """Every ``period``-th layer attends to everything, the others to a window."""
    return [None if index % period == period - 1 else window for index in range(num_layers)]


def test_layers_of_one_kind_are_one_group() -> None:
    for window in (None, 64):
        layout = KVLayout.of([window] * 28, 1000)
        assert layout.windows == (window,)
        assert (layout.num_groups, layout.layers_per_block) == (1, 28)
        assert layout.places == tuple((0, index) for index in range(28))


@pytest.mark.parametrize(
    ("counts", "layers_per_block", "num_groups"),
    [
        ({None: 21, 64: 7}, 7, 4),  # 3 + 1, nothing wasted
        ({64: 22, None: 4}, 4, 7),  # 6 + 1, two layers of 26 too many
        ({64: 24, None: 12}, 12, 3),  # 13 would waste three layers for as many groups
        ({64: 1, None: 1}, 1, 2),
        ({64: 13, None: 13}, 13, 2),
        ({64: 52, None: 10}, 13, 5),
        ({64: 17, None: 1}, 2, 10),
        ({64: 7, None: 1}, 1, 8),  # nothing may be wasted
        ({64: 15, None: 16}, 16, 2),  # one layer of 31 too many is cheaper than 31 groups
        ({64: 10, 128: 10, None: 5}, 5, 5),
    ],
)
def test_groups_are_as_large_as_they_can_be_without_waste(
    counts: dict[int | None, int], layers_per_block: int, num_groups: int
) -> None:
    windows = [window for window, count in counts.items() for _ in range(count)]
    layout = KVLayout.of(windows, 1000)
    assert (layout.layers_per_block, layout.num_groups) == (layers_per_block, num_groups)
    assert Counter(layout.windows) == {w: -(-count // layers_per_block) for w, count in counts.items()}


def test_groups_come_in_the_order_of_their_layers() -> None:
    layout = KVLayout.of(pattern(4, 64, 8), 1000)
    assert layout.windows == (64, None, 64)
    assert layout.places == ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (1, 1))


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    assert KVLayout.of([None, 64, 64, None], 64).windows == (None,)
    assert KVLayout.of([None, 64, 64, None], 65).windows == (None, 64)
    assert KVLayout.of([100, 64], 80).windows == (None, 64)


@hypothesis.given(st.lists(st.sampled_from([None, 8, 16]), min_size=1, max_size=40))
def test_every_layer_has_a_place_of_its_own_in_a_group_of_its_kind(windows: list[int | None]) -> None:
    layout = KVLayout.of(windows, 1000)
    assert len(set(layout.places)) == len(layout.places) == len(windows)
    size = layout.layers_per_block
    for window, (group, index) in zip(windows, layout.places, strict=True):
        assert layout.windows[group] == window
        assert 0 <= index < size
    assert {group for group, _ in layout.places} == set(range(layout.num_groups))
    unused = layout.num_groups * size - len(windows)
    assert unused <= MAX_WASTE * len(windows)


def test_layers_of_several_dtypes_and_one_window_are_one_group() -> None:
    layout = KVLayout.of([None] * 5, 1000, ["a", "b", "b", "a", "b"], {"a": 2, "b": 1})
    assert layout.windows == (None,)
    assert layout.dtypes == ("a", "a", "b", "b", "b")
    assert layout.places == ((0, 0), (0, 2), (0, 3), (0, 1), (0, 4))


def test_a_group_has_each_dtype_in_the_numbers_of_the_others() -> None:
    """Five of six layers have a window; the first and the last two of twelve keep more bits."""
    dtypes = ["a", *["b"] * 9, "a", "a"]
    layout = KVLayout.of(pattern(6, 64, 12), 1000, dtypes, {"a": 4, "b": 1})
    assert layout.dtypes == ("a", "b", "b", "b", "b")
    assert Counter(layout.windows) == {64: 2, None: 1}  # 24 for what 21 would do for: the least there is


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from([None, 8, 16]), st.sampled_from("abc")), min_size=1, max_size=24),
    st.fixed_dictionaries({dtype: st.integers(1, 8) for dtype in "abc"}),
)
def test_layers_that_share_an_index_have_one_dtype(
    kinds: list[tuple[int | None, str]], sizes: dict[str, int]
) -> None:
    windows, dtypes = [window for window, _ in kinds], [dtype for _, dtype in kinds]
    layout = KVLayout.of(windows, 1000, dtypes, sizes)
    assert len(set(layout.places)) == len(layout.places) == len(kinds)
    for (window, dtype), (group, index) in zip(kinds, layout.places, strict=True):
        assert layout.windows[group] == window
        assert layout.dtypes[index] == dtype
    assert {group for group, _ in layout.places} == set(range(layout.num_groups))
    assert {index for _, index in layout.places} == set(range(layout.layers_per_block))
    # No more than where each layer has a group of its own kind to itself.
    needed = sum(sizes[dtype] for dtype in dtypes)
    taken = layout.num_groups * sum(sizes[dtype] for dtype in layout.dtypes)
    assert needed <= taken <= max((1 + MAX_WASTE) * needed, len(kinds) * sum(sizes[d] for d in set(dtypes)))

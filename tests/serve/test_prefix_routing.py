"""Beginnings that are the same meet, no replica gets much more than its share, and what need not move does not."""

import json
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.serve.prefix_routing import (
    DEPTHS,
    LoadBound,
    body_keys,
    placement,
    prefix_keys,
    rendezvous_order,
)

BOUND = LoadBound()
replica_names = st.lists(
    st.text("abcdef0123456789", min_size=1, max_size=8), min_size=1, max_size=9, unique=True
)
key_chains = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3)


def idle(names: Sequence[str]) -> dict[str, int]:
    return dict.fromkeys(names, 0)


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


# Keys.


@given(st.binary(max_size=5000), st.binary(max_size=300), st.binary(max_size=300))
def test_prompts_share_the_keys_of_what_both_begin_with(common: bytes, left: bytes, right: bytes) -> None:
    shared = sum(depth <= len(common) for depth in DEPTHS)
    assert prefix_keys(common + left)[:shared] == prefix_keys(common + right)[:shared]


@given(st.binary(max_size=5000), st.binary(max_size=5000))
def test_prompts_that_differ_early_share_no_key(left: bytes, right: bytes) -> None:
    if left[: DEPTHS[0]] != right[: DEPTHS[0]]:
        assert not set(prefix_keys(left)) & set(prefix_keys(right))


def test_number_of_keys_grows_with_the_prompt() -> None:
    sizes = (0, 1, 255, 256, 1023, 1024, 4095, 4096, 100_000)
    assert [len(prefix_keys(b"x" * size)) for size in sizes] == [1, 1, 1, 1, 1, 2, 2, 3, 3]
    assert prefix_keys(b"x" * 5000) == prefix_keys(b"x" * 100_000)


def test_salts_separate() -> None:
    assert prefix_keys(b"the same", salt=b"one") != prefix_keys(b"the same", salt=b"two")
    assert body_keys(body(prompt="p", cache_salt="a")) != body_keys(body(prompt="p", cache_salt="b"))
    assert body_keys(body(prompt="p"), "key-1") != body_keys(body(prompt="p"), "key-2")


def test_keys_do_not_depend_on_the_process() -> None:
    # Routers in different processes have to agree, so hash() with its random seed would not do.
    assert prefix_keys(b"abc", salt=b"s") == (9265128791005533867,)


def test_conversation_keeps_its_first_key_as_it_grows() -> None:
    turns = [{"role": "system", "content": "rule " * 80}, {"role": "user", "content": "first question"}]
    first = body_keys(body(model="m", messages=turns, temperature=0))
    turns += [{"role": "assistant", "content": "answer " * 300}, {"role": "user", "content": "second"}]
    second = body_keys(body(model="m", messages=turns, stream=True))
    assert len(first) == 1
    assert second[:1] == first
    assert len(second) == 2


@pytest.mark.parametrize(
    "prompt",
    ["text", "text" * 1000, [1, 2, 3], list(range(3000)), ["one", "two"], [[1], [2]], "\u00e9\U0001f600"],
)
def test_each_form_of_a_prompt_has_keys(prompt: object) -> None:
    keys = body_keys(body(prompt=prompt, max_tokens=5))
    assert keys
    assert keys == body_keys(body(prompt=prompt, seed=1, n=2))
    assert keys != body_keys(body(prompt="another " * 100, max_tokens=5))


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"prompt": null}', b'{"model": "m"}', b"[" * 100_000]
)
def test_what_has_no_prompt_has_no_keys(raw: bytes) -> None:
    assert body_keys(raw) == ()


# Rendezvous hashing.


@given(st.integers(0, 2**64 - 1), replica_names, st.randoms(use_true_random=False))
def test_rank_is_independent_of_the_order_of_listing(key: int, names: list[str], random: object) -> None:
    shuffled = sorted(names, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert rendezvous_order(key, names) == rendezvous_order(key, shuffled)


@given(st.integers(0, 2**64 - 1), replica_names)
def test_leaving_replica_takes_no_other_out_of_order(key: int, names: list[str]) -> None:
    order = rendezvous_order(key, names)
    for gone in names:
        assert rendezvous_order(key, [n for n in names if n != gone]) == [n for n in order if n != gone]


def test_keys_spread_evenly() -> None:
    names = [f"replica-{i}" for i in range(5)]
    counts = Counter(rendezvous_order(prefix_keys(b"%d" % i)[0], names)[0] for i in range(5000))
    assert set(counts) == set(names)
    assert 900 < min(counts.values()) <= max(counts.values()) < 1100


# Placement.


@given(key_chains, replica_names, st.integers(0, 50))
def test_same_prefix_goes_to_the_same_replica_at_equal_load(
    keys: list[int], names: list[str], load: int
) -> None:
    loads = dict.fromkeys(names, load)
    assert placement(keys, loads, BOUND)[0] == rendezvous_order(keys[0], names)[0]
    # What follows the shared beginning does not matter.
    assert placement([*keys, 7], loads, BOUND)[0] == placement([*keys, 8], loads, BOUND)[0]


@given(key_chains, replica_names)
def test_removal_moves_only_the_keys_of_the_removed(keys: list[int], names: list[str]) -> None:
    before = placement(keys, idle(names), BOUND)[0]
    for gone in names:
        left = idle([name for name in names if name != gone])
        if left and gone != before:
            assert placement(keys, left, BOUND)[0] == before


@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=3), st.dictionaries(st.text(max_size=4), st.integers(0, 99))
)
def test_every_replica_is_tried_once(keys: list[int], loads: dict[str, int]) -> None:
    assert sorted(placement(keys, loads, BOUND)) == sorted(loads)


@given(
    key_chains,
    st.dictionaries(st.text(max_size=4), st.integers(0, 99), min_size=1),
    st.floats(1, 4),
    st.integers(1, 40),
)
def test_first_choice_is_within_the_bound(
    keys: list[int], loads: dict[str, int], factor: float, allowance: int
) -> None:
    bound = LoadBound(factor=factor, allowance=allowance)
    limit = bound.limit(sum(loads.values()), len(loads))
    order = placement(keys, loads, bound)
    assert loads[order[0]] < limit
    beyond = [loads[name] >= limit for name in order]
    assert beyond == sorted(beyond), "one beyond the bound before one within it"


@given(
    replica_names,
    st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=120),
    st.sampled_from([1.0, 1.25, 2.0]),
    st.integers(1, 8),
)
def test_loads_stay_within_the_bound_under_skew(
    names: list[str], events: list[tuple[bool, int]], factor: float, allowance: int
) -> None:
    """Nine of ten requests have the same beginning; they come and go in any order."""
    bound = LoadBound(factor=factor, allowance=allowance)
    loads, under_way = idle(names), list[str]()
    for arrives, number in events:
        if arrives:
            keys = prefix_keys(b"the same" if number else b"another")
            limit = bound.limit(sum(loads.values()), len(loads))
            chosen = placement(keys, loads, bound)[0]
            loads[chosen] += 1
            under_way.append(chosen)
            assert loads[chosen] <= limit
        elif under_way:
            loads[under_way.pop(number % len(under_way))] -= 1


def test_one_beginning_for_all_still_uses_every_replica() -> None:
    names = [f"replica-{i}" for i in range(4)]
    loads = idle(names)
    for _ in range(400):
        loads[placement(prefix_keys(b"the same"), loads, BOUND)[0]] += 1
    assert min(loads.values()) >= 25
    assert max(loads.values()) <= 126


def test_allowance_keeps_few_requests_together() -> None:
    loads = idle([f"replica-{i}" for i in range(4)])
    bound = LoadBound(allowance=16)
    for _ in range(16):
        loads[placement(prefix_keys(b"the same"), loads, bound)[0]] += 1
    assert sorted(loads.values()) == [0, 0, 0, 16]


def test_conversations_under_one_full_replica_part_and_come_back() -> None:
    names = [f"replica-{i}" for i in range(4)]
    system = b"rule " * 100
    chats = [prefix_keys(system + b"chat %03d " % i * 200) for i in range(60)]
    favourite = placement(chats[0], idle(names), BOUND)[0]
    assert {placement(keys, idle(names), BOUND)[0] for keys in chats} == {favourite}
    busy = idle(names) | {favourite: 30}
    seconds = [placement(keys, busy, BOUND)[0] for keys in chats]
    assert set(seconds) == set(names) - {favourite}
    assert [placement(keys, busy, BOUND)[0] for keys in chats] == seconds


def test_without_keys_the_least_busy_comes_first() -> None:
    assert placement((), {"a": 3, "b": 0, "c": 1}, BOUND) == ["b", "c", "a"]


@pytest.mark.parametrize(("name", "value"), [("factor", 0.99), ("factor", float("nan")), ("allowance", 0)])
def test_senseless_bounds_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        LoadBound(**{name: value})  # type: ignore[arg-type]

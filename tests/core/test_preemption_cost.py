"""What the choice between swapping and recomputing follows, and what it does not follow."""

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxpaged.preemption_cost import DECAY, EXPOSED_SHARE, MAX_RATIO, PreemptionCost

BLOCK_BYTES = 1_000_000


def make_cost(**options: float) -> PreemptionCost:
    """A block takes 1 ms each way until a transfer is observed, as far as it is waited for."""
    return PreemptionCost(BLOCK_BYTES, **{"bytes_per_second": 2e9 * EXPOSED_SHARE, **options})


def test_swapping_is_preferred_until_a_large_step_was_seen() -> None:
    cost = make_cost(min_step_tokens=100)
    assert cost.seconds_to_recompute(1) is None
    assert cost.prefers_swap(10**6, 1)
    cost.observe_step(99, 1e-9)
    assert cost.prefers_swap(10**6, 1), "a small step is no measure"
    cost.observe_step(100, 1e-9)
    assert not cost.prefers_swap(1, 1)


def test_nothing_to_compute_again_is_nothing_to_swap() -> None:
    assert not make_cost().prefers_swap(0, 0)


def test_the_cheaper_way_is_taken() -> None:
    cost = make_cost()
    assert cost.seconds_to_swap(10) == pytest.approx(10e-3)
    cost.observe_step(1000, 1.0)  # 1 ms a token
    assert cost.seconds_to_recompute(10) == pytest.approx(10e-3)
    assert cost.prefers_swap(10, 11)
    assert not cost.prefers_swap(10, 9)
    assert not cost.prefers_swap(11, 10)


def test_equal_costs_are_no_reason_to_swap() -> None:
    cost = PreemptionCost(2, bytes_per_second=1.0, min_step_tokens=1)
    cost.observe_step(1, EXPOSED_SHARE * 4)
    assert cost.seconds_to_swap(8) == cost.seconds_to_recompute(8)
    assert not cost.prefers_swap(8, 8)


def test_a_measured_bandwidth_replaces_the_believed_one() -> None:
    cost = make_cost()
    cost.observe_step(1000, 1.0)
    assert cost.prefers_swap(5, 10)
    cost.observe_transfer(BLOCK_BYTES, 5e-3)
    assert cost.seconds_to_swap(5) == pytest.approx(EXPOSED_SHARE * 2 * 5 * 5e-3)
    assert not cost.prefers_swap(5, 10)


def test_observations_are_weighted_by_size_and_age() -> None:
    cost = make_cost(min_step_tokens=1)
    cost.observe_step(100, 1.0)
    cost.observe_step(300, 1.0)
    assert cost.seconds_to_recompute(1) == pytest.approx((DECAY * 1.0 + 1.0) / (DECAY * 100 + 300))
    cost.observe_transfer(1000, 1.0)
    cost.observe_transfer(8000, 2.0)
    per_byte = (DECAY * 1.0 + 2.0) / (DECAY * 1000 + 8000)
    assert cost.seconds_to_swap(1) == pytest.approx(EXPOSED_SHARE * 2 * BLOCK_BYTES * per_byte)


def test_the_estimate_follows_a_lasting_change() -> None:
    cost = make_cost()
    for seconds in (1.0, 0.01, 5.0):
        for _ in range(60):
            cost.observe_step(1000, seconds)
        assert cost.seconds_to_recompute(1000) == pytest.approx(seconds, rel=0.2)


def test_one_pause_of_the_machine_is_no_trend() -> None:
    cost = make_cost()
    for _ in range(50):
        cost.observe_step(1000, 0.1)
        cost.observe_transfer(BLOCK_BYTES, 0.1)
    before = cost.seconds_to_swap(1)
    cost.observe_step(1000, 1000.0)
    cost.observe_transfer(BLOCK_BYTES, 1000.0)
    bound = DECAY + (1 - DECAY) * MAX_RATIO + 0.01
    assert 0.1 < (cost.seconds_to_recompute(1000) or 0) < 0.1 * bound
    assert before < cost.seconds_to_swap(1) < before * bound


def test_what_says_nothing_changes_nothing() -> None:
    cost = make_cost()
    cost.observe_transfer(BLOCK_BYTES, 5e-3)
    before = cost.seconds_to_swap(1)
    cost.observe_transfer(0, 1.0)
    cost.observe_step(0, 1.0)
    assert cost.seconds_to_swap(1) == before
    assert cost.seconds_to_recompute(1) is None


def test_a_clock_that_saw_no_time_pass_does_not_bind_later_observations() -> None:
    cost = make_cost()
    cost.observe_step(1000, 0.0)
    assert cost.seconds_to_recompute(1000) == 0.0
    cost.observe_step(1000, 1.0)
    assert (cost.seconds_to_recompute(1000) or 0) > 0.5


@pytest.mark.parametrize(
    "options", [{"bytes_per_second": 0.0}, {"min_step_tokens": 0}, {"bytes_per_block": 0}]
)
def test_sizes_must_be_positive(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        PreemptionCost(**{"bytes_per_block": 1, **options})


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 100)), min_size=1, max_size=20),
    st.integers(1, 1000),
    st.integers(1, 1000),
)
def test_more_to_compute_never_speaks_against_swapping(
    steps: list[tuple[int, float]], num_blocks: int, num_tokens: int
) -> None:
    cost = make_cost(min_step_tokens=1)
    for count, seconds in steps:
        cost.observe_step(count, seconds)
        cost.check_invariants()
    if cost.prefers_swap(num_blocks, num_tokens):
        assert cost.prefers_swap(num_blocks, num_tokens + 1)
        assert cost.prefers_swap(num_blocks - 1, num_tokens)
    else:
        assert not cost.prefers_swap(num_blocks + 1, num_tokens)

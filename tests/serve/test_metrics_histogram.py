"""Histograms that are told how often a value came."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.serve.metrics.histogram import Histogram

BOUNDS = (0.01, 0.1, 1.0, 10.0)
VALUES = st.one_of(st.sampled_from(BOUNDS), st.floats(0, 100))


@given(st.lists(st.tuples(VALUES, st.integers(1, 50))))
def test_counts_are_cumulative_and_a_bound_belongs_to_its_bucket(
    observations: list[tuple[float, int]],
) -> None:
    histogram = Histogram(BOUNDS)
    for value, count in observations:
        histogram.observe(value, count)
    counts, total = histogram.read()
    for bound, count in zip((*BOUNDS, math.inf), counts, strict=True):
        assert count == sum(n for value, n in observations if value <= bound)
    assert total == pytest.approx(sum(value * n for value, n in observations))
    histogram.check_invariants()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-9])
def test_a_value_that_says_nothing_does_not_spoil_the_sum(value: float) -> None:
    histogram = Histogram(BOUNDS)
    histogram.observe(0.5)
    histogram.observe(value, 7)
    assert histogram.read() == ([0, 0, 1, 1, 1], 0.5)


@pytest.mark.parametrize("bounds", [(), (1, 1), (2, 1), (1, math.inf), (math.nan,)])
def test_bounds_must_ascend(bounds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="bounds="):
        Histogram(bounds)


def test_threads_lose_no_observation() -> None:
    histogram = Histogram(BOUNDS)
    num_threads, each = 4, 5_000

    def observe() -> None:
        for _ in range(each):
            histogram.observe(0.5, 2)

    threads = [threading.Thread(target=observe) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        counts, total = histogram.read()
        assert total == 0.5 * counts[-1], "counts and sum of different moments"
    for thread in threads:
        thread.join()
    assert histogram.read() == ([0, 0, *[2 * num_threads * each] * 3], float(num_threads * each))

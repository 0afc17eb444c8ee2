"""The memory monitor: levels, hysteresis, what it advises, and that it can never stop the engine."""

import logging
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.errors import InvalidRequestError
from jaxpaged.memory_monitor import MemoryAdvice, MemoryLevel, MemoryMonitor

NORMAL, WARNING, CRITICAL = MemoryLevel


def levels(monitor: MemoryMonitor, *live: int, num_usable: int = 100) -> list[MemoryLevel]:
    """The level after each count of live blocks."""
    found = []
    for num_live in live:
        advice = monitor.observe(num_live, num_usable, 1, 64)
        monitor.check_invariants()
        assert advice.level is monitor.level
        found.append(advice.level)
    return found


def test_a_level_begins_at_its_threshold() -> None:
    monitor = MemoryMonitor(0.9, 0.95, 0.0)
    assert levels(monitor, 0, 89, 90, 94, 95, 100) == [NORMAL, NORMAL, WARNING, WARNING, CRITICAL, CRITICAL]


def test_a_level_ends_only_below_threshold_and_hysteresis() -> None:
    monitor = MemoryMonitor(0.5, 0.75, 0.125)
    assert levels(monitor, 6, 5, 3, 2, num_usable=8) == [CRITICAL, CRITICAL, WARNING, NORMAL]
    assert levels(monitor, 3, 4, 3, 2, num_usable=8) == [NORMAL, WARNING, WARNING, NORMAL]


def test_without_hysteresis_one_block_less_ends_it() -> None:
    assert levels(MemoryMonitor(0.5, 1.0, 0.0), 4, 3, 4, num_usable=8) == [WARNING, NORMAL, WARNING]


def test_a_full_pool_goes_straight_to_critical_and_back() -> None:
    monitor = MemoryMonitor()
    assert levels(monitor, 100, 0) == [CRITICAL, NORMAL]
    assert monitor.num_transitions == {NORMAL: 1, WARNING: 0, CRITICAL: 1}


def test_a_threshold_of_one_turns_a_level_off() -> None:
    assert levels(MemoryMonitor(0.5, 1.0), 100) == [WARNING]
    assert levels(MemoryMonitor(1.0, 1.0), 100) == [NORMAL]
    assert levels(MemoryMonitor(1, 1), 100) == [NORMAL]


@pytest.mark.parametrize(
    ("num_live", "num_running", "expected"),
    [
        (10, 3, MemoryAdvice(NORMAL, admit=True, max_batched_tokens=64, release_pins=False)),
        (95, 3, MemoryAdvice(WARNING, admit=False, max_batched_tokens=64, release_pins=False)),
        (99, 3, MemoryAdvice(CRITICAL, admit=False, max_batched_tokens=32, release_pins=True)),
        (99, 40, MemoryAdvice(CRITICAL, admit=False, max_batched_tokens=40, release_pins=True)),
        (95, 0, MemoryAdvice(WARNING, admit=True, max_batched_tokens=64, release_pins=False)),
        (99, 0, MemoryAdvice(CRITICAL, admit=True, max_batched_tokens=64, release_pins=True)),
    ],
)
def test_advice(num_live: int, num_running: int, expected: MemoryAdvice) -> None:
    assert MemoryMonitor().observe(num_live, 100, num_running, 64) == expected


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_half_of_a_tiny_budget_is_still_a_token(budget: int) -> None:
    assert MemoryMonitor().observe(10, 10, 1, budget).max_batched_tokens == 1


def test_each_change_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="jaxpaged.memory_monitor"):
        levels(MemoryMonitor(), 10, 95, 96, 94, 99, 99, 90, 90)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "KV memory warning: 95.0% of the blocks in use, 5 free"),
        ("WARNING", "KV memory critical: 99.0% of the blocks in use, 1 free"),
        ("INFO", "KV memory normal: 90.0% of the blocks in use, 10 free"),
    ]


def test_a_level_that_flaps_is_logged_once_in_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monitor = MemoryMonitor()
    with caplog.at_level(logging.INFO, logger="jaxpaged.memory_monitor"):
        for now[0] in (1000.0, 1005.0, 1009.9, 1010.0):
            levels(monitor, 95, 99, 90)
    logged = Counter(record.getMessage().split(":")[0] for record in caplog.records)
    assert logged == {"KV memory warning": 2, "KV memory critical": 2, "KV memory normal": 2}
    assert monitor.num_transitions == {NORMAL: 4, WARNING: 4, CRITICAL: 4}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"warning": 0}, "memory_warning"),
        ({"warning": -0.5}, "memory_warning"),
        ({"warning": 1.5}, "memory_warning"),
        ({"warning": float("nan")}, "memory_warning"),
        ({"warning": True}, "memory_warning"),
        ({"warning": "0.9"}, "memory_warning"),
        ({"critical": 0.9}, "memory_critical"),
        ({"critical": 1.01}, "memory_critical"),
        ({"critical": None}, "memory_critical"),
        ({"hysteresis": -0.1}, "memory_hysteresis"),
        ({"hysteresis": 0.95}, "memory_hysteresis"),
        ({"hysteresis": float("inf")}, "memory_hysteresis"),
    ],
)
def test_bad_thresholds_are_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequestError, match="must be a share") as caught:
        MemoryMonitor(**arguments)
    assert caught.value.argument == named
    assert caught.value.value is next(iter(arguments.values()))


@st.composite
def monitors(draw: st.DrawFn) -> MemoryMonitor:
    warning = draw(st.floats(0.01, 1.0))
    critical = draw(st.floats(warning, 1.0))
    return MemoryMonitor(warning, critical, draw(st.floats(0.0, warning, exclude_max=True)))


STATES = st.tuples(st.integers(0, 40), st.integers(0, 6), st.integers(1, 20))


@given(monitors(), st.integers(1, 40), st.lists(STATES, max_size=30))
def test_advice_never_stops_the_engine(
    monitor: MemoryMonitor, num_usable: int, states: list[tuple[int, int, int]]
) -> None:
    num_changes, before = 0, NORMAL
    for num_live, num_running, budget in states:
        usage = min(num_live, num_usable) / num_usable
        advice = monitor.observe(min(num_live, num_usable), num_usable, num_running, budget)
        monitor.check_invariants()
        assert min(num_running, budget) <= advice.max_batched_tokens <= budget
        assert advice.max_batched_tokens >= max(1, budget // 2)
        assert advice.release_pins == (advice.level is CRITICAL)
        if num_running == 0:
            assert advice.admit
            assert advice.max_batched_tokens == budget
        if advice.level is NORMAL:
            assert advice.admit
            assert advice.max_batched_tokens == budget
        # Never higher than the thresholds say, never lower; between them and the hysteresis it keeps its level.
        by_threshold = [
            level
            for level, threshold in ((NORMAL, 0.0), (WARNING, monitor.warning), (CRITICAL, monitor.critical))
            if usage >= threshold and (level is NORMAL or threshold < 1)
        ][-1]
        assert advice.level.value >= by_threshold.value
        assert advice.level.value <= max(by_threshold.value, before.value)
        num_changes += advice.level is not before
        before = advice.level
    assert sum(monitor.num_transitions.values()) == num_changes

"""Records of iterations and requests: bounded, newest last, summed up as numpy would."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.errors import InvalidRequestError
from jaxpaged.records import IterationRecord, Records, RequestRecord, percentile


def test_times_of_an_iteration_and_of_a_step() -> None:
    record = IterationRecord(
        8, 0.0, schedule_time=1.0, build_time=2.0, device_time=4.0, update_time=8.0, num_steps=4
    )
    assert record.iteration_time == 15.0
    assert record.step_time == 3.75


@pytest.mark.parametrize(
    ("num_live", "num_tokens", "expected"),
    [(0, 0, 0.0), (4, 64, 0.0), (4, 48, 0.25), (4, 16, 0.75)],
)
def test_internal_fragmentation(num_live: int, num_tokens: int, expected: float) -> None:
    record = IterationRecord(1, 0.0, num_live_blocks=num_live, num_kv_tokens=num_tokens, block_size=16)
    assert record.internal_fragmentation == expected


def test_request_from_points_in_time() -> None:
    record = RequestRecord.from_metrics(
        "a",
        arrival_time=10.0,
        first_scheduled_time=12.0,
        first_token_time=13.0,
        last_token_time=21.0,
        finished_time=21.5,
        num_prompt_tokens=7,
        num_cached_tokens=4,
        num_generation_tokens=5,
        num_preemptions=1,
        finish_reason="stop",
        index=2,
    )
    assert record == RequestRecord(
        request_id="a",
        index=2,
        num_prompt_tokens=7,
        num_cached_tokens=4,
        num_generation_tokens=5,
        queue_time=2.0,
        time_to_first_token=3.0,
        time_per_output_token=2.0,
        e2e_time=11.5,
        num_preemptions=1,
        finish_reason="stop",
    )


def test_request_that_was_never_scheduled() -> None:
    record = RequestRecord.from_metrics("a", arrival_time=1.0, finished_time=3.0, finish_reason="timeout")
    assert (record.queue_time, record.time_to_first_token, record.time_per_output_token) == (None, None, None)
    assert record.e2e_time == 2.0


def test_one_token_has_no_time_per_token() -> None:
    record = RequestRecord.from_metrics(
        "a",
        arrival_time=0.0,
        finished_time=1.0,
        first_token_time=1.0,
        last_token_time=1.0,
        num_generation_tokens=1,
    )
    assert record.time_per_output_token is None


def test_the_oldest_are_dropped_and_the_newest_come_last() -> None:
    records = Records(max_iterations=3, max_requests=2)
    for i in range(5):
        records.add_iteration(IterationRecord(i, float(i)))
        records.add_request(RequestRecord(str(i)))
    assert [record.step for record in records.iterations()] == [2, 3, 4]
    assert [record.request_id for record in records.requests()] == ["3", "4"]
    assert (records.num_iterations, records.num_requests) == (5, 5)
    records.clear()
    assert (records.iterations(), records.requests()) == ([], [])
    assert (records.num_iterations, records.num_requests) == (5, 5)


def test_what_is_handed_out_is_a_copy() -> None:
    records = Records()
    records.add_iteration(IterationRecord(1, 0.0))
    records.add_request(RequestRecord("a"))
    records.iterations()[0].step = 7
    records.requests()[0].request_id = "b"
    records.iterations().clear()
    assert records.iterations() == [IterationRecord(1, 0.0)]
    assert records.requests() == [RequestRecord("a")]


def test_summary_of_nothing() -> None:
    nothing = {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None}
    summary = Records().summary()
    assert summary.pop("internal_fragmentation") == {"count": 0, "mean": None}
    assert summary == dict.fromkeys(
        ("step_time", "queue_time", "time_to_first_token", "time_per_output_token", "e2e_time"), nothing
    )


def test_summary_leaves_out_what_never_came() -> None:
    records = Records()
    records.add_request(RequestRecord("a", queue_time=1.0, time_to_first_token=2.0, e2e_time=4.0))
    records.add_request(RequestRecord("b", queue_time=3.0, e2e_time=5.0))
    records.add_request(RequestRecord("c", e2e_time=6.0))
    summary = records.summary()
    assert summary["queue_time"] == {"count": 2, "mean": 2.0, "p50": 2.0, "p90": 2.8, "p99": 2.98}
    assert (summary["time_to_first_token"]["count"], summary["time_to_first_token"]["p99"]) == (1, 2.0)
    assert summary["time_per_output_token"]["count"] == 0
    assert (summary["e2e_time"]["count"], summary["e2e_time"]["mean"]) == (3, 5.0)


def test_a_program_of_several_steps_counts_as_so_many() -> None:
    records = Records()
    records.add_iteration(IterationRecord(3, 0.0, device_time=3.0, num_steps=3))
    records.add_iteration(IterationRecord(4, 0.0, device_time=5.0))
    assert records.summary()["step_time"] == pytest.approx(
        {"count": 4, "mean": 2.0, "p50": 1.0, "p90": 3.8, "p99": 4.88}
    )


def test_fragmentation_is_weighted_with_time() -> None:
    records = Records()
    records.add_iteration(
        IterationRecord(1, 0.0, num_live_blocks=1, num_kv_tokens=12, block_size=16, device_time=3.0)
    )
    records.add_iteration(
        IterationRecord(2, 0.0, num_live_blocks=1, num_kv_tokens=4, block_size=16, update_time=1.0)
    )
    records.add_iteration(IterationRecord(3, 0.0, device_time=100.0, block_size=16))  # nothing is live
    assert records.summary()["internal_fragmentation"] == {"count": 2, "mean": 0.375}


@pytest.mark.parametrize("arguments", [{"max_iterations": 0}, {"max_requests": -1}, {"max_requests": 1.5}])
def test_bad_limits_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="at least 1") as caught:
        Records(**arguments)
    assert caught.value.argument == next(iter(arguments))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(samples: list[float], percent: float) -> None:
    samples.sort()
    assert percentile(samples, percent) == pytest.approx(np.percentile(samples, percent), rel=1e-9, abs=1e-9)


@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 8), st.integers(0, 3))), max_size=40))
def test_times_are_those_of_the_kept_records_whenever_they_are_asked_for(
    events: list[tuple[int, int] | None],
) -> None:
    records = Records(max_iterations=4, max_requests=3)
    for event in events:
        if event is None:
            records.times()
        elif event == (0, 0):
            records.clear()
        else:
            time, kind = event
            records.add_iteration(IterationRecord(1, 0.0, device_time=float(time), num_steps=1 + kind))
            records.add_request(
                RequestRecord("a", queue_time=float(time) if kind else None, e2e_time=float(kind))
            )
    kept = [record.step_time for record in records.iterations() for _ in range(record.num_steps)]
    found = records.times()
    assert found["step_time"]["count"] == len(kept)
    if kept:
        assert found["step_time"]["p90"] == pytest.approx(np.percentile(kept, 90))
    queued = [record.queue_time for record in records.requests() if record.queue_time is not None]
    assert found["queue_time"]["mean"] == (sum(queued) / len(queued) if queued else None)
    assert found["e2e_time"]["count"] == len(records.requests())
    records.check_invariants()

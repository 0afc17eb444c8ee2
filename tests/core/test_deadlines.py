"""When requests run out of time: who ends, when, and how long a deadline is remembered."""

import pytest

from jaxpaged.deadlines import Deadlines
from jaxpaged.request import Request, RequestStatus
from tests.core.pool_model import make_request, make_scheduler


def late(name: str, deadline: float | None = None, queue_deadline: float | None = None) -> Request:
    (request,) = make_request(name, [1], block_size=4, deadline=deadline, queue_deadline=queue_deadline)
    return request


def names(requests: list[Request]) -> list[str]:
    return [f"{request.request_id}{request.index}" for request in requests]


def test_requests_are_reported_once_in_the_order_of_their_deadlines() -> None:
    deadlines = Deadlines()
    for request in (late("b", 2.0), late("a", 1.0), late("never"), late("both", 3.0, 1.5), late("c", 9.0)):
        deadlines.add(request)
    assert deadlines.expired(0.5) == []
    assert names(deadlines.expired(3.0)) == ["a0", "both0", "b0"], "once, though both its times are over"
    assert deadlines.expired(3.0) == []
    assert names(deadlines.expired(9.0)) == ["c0"], "at its deadline, not after it"


def test_who_has_finished_or_begun_is_not_late() -> None:
    deadlines = Deadlines()
    finished, begun = late("finished", 1.0), late("begun", 5.0, 1.0)
    deadlines.add(finished)
    deadlines.add(begun)
    finished.status = RequestStatus.FINISHED_STOPPED
    begun.queue_deadline = None
    assert deadlines.expired(2.0) == []
    assert names(deadlines.expired(5.0)) == ["begun0"], "to begin in time is not to finish in time"


def test_deadlines_of_finished_requests_are_forgotten_however_far_away() -> None:
    deadlines = Deadlines()
    live = [late(f"live{i}", 1e9) for i in range(100)]
    for request in live:
        deadlines.add(request)
    for index in range(10_000):
        done = late(str(index), 1e9)
        deadlines.add(done)
        done.status = RequestStatus.FINISHED_LENGTH
    assert len(deadlines) <= 2 * (len(live) + 1)
    assert set(deadlines.expired(1e9)) == set(live), "and those of live ones are not"


def test_the_time_in_the_queue_ends_with_the_first_step() -> None:
    scheduler = make_scheduler(num_blocks=20, block_size=4, max_num_seqs=1)
    for name in "ab":
        (request,) = make_request(name, [1, 2], block_size=4, deadline=9.0, queue_deadline=2.0)
        scheduler.add(request)
    scheduler.update(scheduler.schedule(), [7])
    assert names(scheduler.deadlines.expired(3.0)) == ["b0"], "a has begun"
    assert names(scheduler.deadlines.expired(9.0)) == ["a0", "b0"]


@pytest.mark.parametrize("begun", [False, True])
def test_every_completion_has_the_deadline_of_its_request(begun: bool) -> None:
    """One that goes on after the first has finished ends in time; one that waits for a row has begun with the first."""
    scheduler = make_scheduler(num_blocks=20, block_size=4, max_num_seqs=1)
    requests = make_request("a", [1, 2, 3], block_size=4, n=3, max_tokens=1, deadline=5.0, queue_deadline=2.0)
    scheduler.add(requests[0])
    if begun:
        scheduler.update(scheduler.schedule(), [7])
        assert requests[0].status.is_finished
        assert scheduler.deadlines.expired(4.0) == []
        assert names(scheduler.deadlines.expired(5.0)) == ["a1", "a2"]
    else:
        assert names(scheduler.deadlines.expired(4.0)) == ["a0", "a1", "a2"]

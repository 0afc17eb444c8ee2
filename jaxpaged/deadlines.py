"""Requests that have no time left."""

import heapq
import itertools

from jaxpaged.request import Request


class Deadlines:
    """When requests must have finished, or must have begun to run; O(log n) a request, O(1) a step."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._ids = itertools.count()
        self._max_entries = 64

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request) -> None:
        """Notes a request's deadlines, if it has any."""
        for when in (request.deadline, request.queue_deadline):
            if when is not None:
                heapq.heappush(self._heap, (when, next(self._ids), request))
        if len(self._heap) > self._max_entries:
            # A deadline far away must not keep a request that has long finished.
            self._heap = [entry for entry in self._heap if not entry[2].status.is_finished]
            heapq.heapify(self._heap)
            self._max_entries = max(64, 2 * len(self._heap))

    def expired(self, now: float) -> list[Request]:
        """Unfinished requests whose time is over, each once.

        One that has begun to run no longer has a ``queue_deadline``: the scheduler takes it off then.
        """
        over: dict[Request, None] = {}
        while self._heap and self._heap[0][0] <= now:
            when, _, request = heapq.heappop(self._heap)
            is_due = when in (request.deadline, request.queue_deadline)
            if is_due and not request.status.is_finished:
                over[request] = None
        return list(over)

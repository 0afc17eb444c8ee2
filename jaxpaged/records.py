"""What each step and each request was like: the last thousand of both, always kept, plain numbers.

``EngineStats`` sums up; these tell one step from the next. The fields of an iteration follow TensorRT-LLM's
iteration statistics; times of a request are defined as serving benchmarks define them.
"""

import copy
import itertools
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from jaxpaged.errors import InvalidRequestError


@dataclass(slots=True)
class IterationRecord:
    """One turn of the engine's loop. Counts of requests and blocks are those after it; times are seconds.

    Attributes:
      step: number of its last step, as ``EngineStats.num_steps`` counts them.
      time: when it ended, of ``time.monotonic``.
      num_scheduled_tokens: tokens computed, of which ``num_prompt_tokens`` belong to prompts or are computed again
        after a preemption.
      num_padded_tokens: tokens of the bucket beyond those.
      num_generation_tokens: tokens sampled and kept.
      num_free_blocks: blocks nobody holds, of which ``num_cached_blocks`` hold a prefix that can be found.
      num_kv_tokens: slots of live blocks that hold something. A token has one in each group of layers that has block
        tables of its own; those of a block that several hold count once.
      blocks_allocated, num_preempted, num_swapped_out, num_swapped_in: of this turn alone; the latter three count
        requests.
      schedule_time, build_time, device_time, update_time: as in ``EngineStats``.
      num_steps: steps of its one program.
      block_size: tokens a block.
    """

    step: int
    time: float
    num_running: int = 0
    num_waiting: int = 0
    num_swapped: int = 0
    num_scheduled_tokens: int = 0
    num_padded_tokens: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_live_blocks: int = 0
    num_kv_tokens: int = 0
    blocks_allocated: int = 0
    num_preempted: int = 0
    num_swapped_out: int = 0
    num_swapped_in: int = 0
    schedule_time: float = 0.0
    build_time: float = 0.0
    device_time: float = 0.0
    update_time: float = 0.0
    num_steps: int = 1
    block_size: int = 1

    @property
    def iteration_time(self) -> float:
        """Seconds of the whole turn, all its steps together."""
        return self.schedule_time + self.build_time + self.device_time + self.update_time

    @property
    def step_time(self) -> float:
        """Seconds a step."""
        return self.iteration_time / max(1, self.num_steps)

    @property
    def internal_fragmentation(self) -> float:
        """Share of the slots in live blocks that hold nothing; 0 when no block is live.

        Blocks are filled front to back, so this is the unused end of each sequence's last block.
        """
        slots = self.num_live_blocks * self.block_size
        return 1.0 - self.num_kv_tokens / slots if slots else 0.0


@dataclass(slots=True)
class RequestRecord:
    """One completion from arrival to end, times in seconds; None where that never came.

    Attributes:
      queue_time: arrival until first scheduled.
      time_to_first_token: arrival until the first token (TTFT).
      time_per_output_token: mean of the tokens after the first (TPOT); None with fewer than two.
      e2e_time: arrival until the end, whatever it was.
    """

    request_id: str
    index: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generation_tokens: int = 0
    queue_time: float | None = None
    time_to_first_token: float | None = None
    time_per_output_token: float | None = None
    e2e_time: float = 0.0
    num_preemptions: int = 0
    finish_reason: str | None = None

    @classmethod
    def from_metrics(
        cls,
        request_id: str,
        *,
        arrival_time: float,
        finished_time: float,
        first_scheduled_time: float | None = None,
        first_token_time: float | None = None,
        last_token_time: float | None = None,
        num_prompt_tokens: int = 0,
        num_cached_tokens: int = 0,
        num_generation_tokens: int = 0,
        num_preemptions: int = 0,
        finish_reason: str | None = None,
        index: int = 0,
    ) -> Self:
        """From points in time, as ``RequestMetrics`` has them; all of one clock.

        ``finished_time`` is when the completion ended. The completions of one request share a ``RequestMetrics``: taken
        when a completion ends, its ``last_token_time`` is that completion's.
        """
        per_token = None
        if first_token_time is not None and last_token_time is not None and num_generation_tokens > 1:
            per_token = (last_token_time - first_token_time) / (num_generation_tokens - 1)
        return cls(
            request_id,
            index,
            num_prompt_tokens,
            num_cached_tokens,
            num_generation_tokens,
            None if first_scheduled_time is None else first_scheduled_time - arrival_time,
            None if first_token_time is None else first_token_time - arrival_time,
            per_token,
            finished_time - arrival_time,
            num_preemptions,
            finish_reason,
        )


class RecordListener(Protocol):
    """Is told of every record as it comes, in the engine's thread: returns within microseconds and never raises."""

    def stepped(self, record: IterationRecord) -> None:
        """A turn of the engine's loop has ended; nobody changes the record any more."""

    def ended(self, record: RequestRecord) -> None:
        """A completion has ended; nobody changes the record any more."""


Distribution = dict[str, float | None]
REQUEST_TIMES = ("queue_time", "time_to_first_token", "time_per_output_token", "e2e_time")


class Records:
    """The latest iterations and requests, the oldest dropped first.

    Invariants (``check_invariants``): at most ``max_iterations`` and ``max_requests`` are kept; percentiles are of
    their times and no others. ``num_iterations`` and ``num_requests`` count all that ever came. Each of ``listeners``
    is told of every record, in the order in which they come.

    Raises:
      InvalidRequestError: a limit is not an integer of at least 1.
    """

    def __init__(self, max_iterations: int = 1000, max_requests: int = 1000) -> None:
        for name, limit in (("max_iterations", max_iterations), ("max_requests", max_requests)):
            if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
                raise InvalidRequestError(name, limit, "must be an integer of at least 1")
        self._iterations: deque[IterationRecord] = deque(maxlen=max_iterations)
        self._requests: deque[RequestRecord] = deque(maxlen=max_requests)
        self.num_iterations = 0
        self.num_requests = 0
        self.listeners: list[RecordListener] = []
        self._step_times = _SortedTimes("step_time")
        self._request_times = [_SortedTimes(name) for name in REQUEST_TIMES]

    def add_iteration(self, record: IterationRecord) -> None:
        """Keeps a record, which nobody changes any more."""
        self._iterations.append(record)
        self.num_iterations += 1
        for listener in self.listeners:
            listener.stepped(record)

    def add_request(self, record: RequestRecord) -> None:
        """Keeps a record, which nobody changes any more."""
        self._requests.append(record)
        self.num_requests += 1
        for listener in self.listeners:
            listener.ended(record)

    def iterations(self) -> list[IterationRecord]:
        """Copies of the kept iterations, the newest last."""
        return [copy.copy(record) for record in self._iterations]

    def requests(self) -> list[RequestRecord]:
        """Copies of the kept requests, the newest last."""
        return [copy.copy(record) for record in self._requests]

    def clear(self) -> None:
        """Forgets all records, for a measurement that begins now; the counts go on."""
        self._iterations.clear()
        self._requests.clear()
        for times in (self._step_times, *self._request_times):
            times.clear()

    def times(self) -> dict[str, Distribution]:
        """Distributions over the kept records: ``count``, ``mean``, ``p50``, ``p90`` and ``p99`` of seconds.

        Keys are ``step_time`` (a program of several steps counts as so many), ``queue_time``, ``time_to_first_token``,
        ``time_per_output_token`` and ``e2e_time``; requests that lack a time are left out of it. Percentiles
        interpolate between neighbours. What has no samples is None. Takes a microsecond or two a record that is new
        since the last call.
        """
        requests = {t.name: t.distribution(self._requests, self.num_requests) for t in self._request_times}
        return {"step_time": self._step_times.distribution(self._iterations, self.num_iterations), **requests}

    def summary(self) -> dict[str, Distribution]:
        """``times``, and ``internal_fragmentation`` with ``count`` and ``mean`` alone.

        This is over the iterations with a live block, each weighted with its time; it looks at all of them.
        """
        return {**self.times(), "internal_fragmentation": self._fragmentation()}

    def _fragmentation(self) -> Distribution:
        held = [r for r in self._iterations if r.num_live_blocks]
        seconds = sum(r.iteration_time for r in held)
        weighted = sum(r.iteration_time * r.internal_fragmentation for r in held)
        return {"count": len(held), "mean": weighted / seconds if seconds > 0 else None}

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        found = self.times()
        assert len(self._iterations) <= (self._iterations.maxlen or 0), "too many iterations"
        assert len(self._requests) <= (self._requests.maxlen or 0), "too many requests"
        assert found["step_time"] == _SortedTimes("step_time").distribution(
            self._iterations, len(self._iterations)
        ), "step times of other records"
        for name in REQUEST_TIMES:
            again = _SortedTimes(name).distribution(self._requests, len(self._requests))
            assert found[name] == again, f"{name} of other records"


def percentile(ascending: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of the samples lie below, linear between neighbours (numpy's default)."""
    place = (len(ascending) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (place - below) * (ascending[above] - ascending[below])


class _SortedTimes:
    """One of the times of the kept records in ascending order, brought up to date when it is asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._num_seen = 0
        self._arrived: deque[list[float]] = deque()  # what each record added to ``_ascending``
        self._ascending: list[float] = []
        self._distribution = _distribution([])

    def clear(self) -> None:
        """Forgets all samples."""
        self._arrived.clear()
        self._ascending.clear()
        self._distribution = _distribution([])

    def distribution(self, kept: Collection[IterationRecord | RequestRecord], num_ever: int) -> Distribution:
        """Over the ``kept`` of ``num_ever`` records."""
        num_new = min(num_ever - self._num_seen, len(kept))
        self._num_seen = num_ever
        if num_new:
            for record in itertools.islice(kept, len(kept) - num_new, None):
                self._add(record)
            while len(self._arrived) > len(kept):
                self._drop_oldest()
            self._distribution = _distribution(self._ascending)
        return dict(self._distribution)

    def _add(self, record: IterationRecord | RequestRecord) -> None:
        time: float | None = getattr(record, self.name)
        count = record.num_steps if isinstance(record, IterationRecord) else 1
        self._arrived.append([] if time is None else [time] * count)
        for sample in self._arrived[-1]:
            insort(self._ascending, sample)

    def _drop_oldest(self) -> None:
        for sample in self._arrived.popleft():
            del self._ascending[bisect_left(self._ascending, sample)]


def _distribution(ascending: Sequence[float]) -> Distribution:
    if not ascending:
        return {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None}
    points = {f"p{percent}": percentile(ascending, percent) for percent in (50, 90, 99)}
    return {"count": len(ascending), "mean": sum(ascending) / len(ascending), **points}

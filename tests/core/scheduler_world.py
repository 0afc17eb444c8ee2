"""A scheduler over simulated memory, and everything that has to hold whatever is done to it.

A step goes the way that ``EngineCore`` goes: late requests end, the step is planned, its moves and writes are done, it
counts as computed, and its tokens are collected at once or, with overlap, after the next step has been handed over.
``scheduler_operations`` has what users and accidents do.
"""

import logging
from collections import Counter, deque
from dataclasses import dataclass
from random import Random
from unittest import mock

import jaxpaged.scheduler
from jaxpaged.preemption import MAX_PREEMPTIONS
from jaxpaged.request import Request, RequestStatus
from jaxpaged.scheduler import ScheduledStep
from tests.core.plan_model import PlanModel
from tests.core.pool_model import PoolModel
from tests.core.scheduler_settings import Settings

VOCAB = 3  # so small that outputs of different requests often agree, and prompts repeat outputs
EOS = 2
STOP_TEXT = 1  # whoever is told to stop by its text stops at this token


@dataclass
class Clock:
    """Stands in for the module ``time`` in the scheduler."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


class World:
    """One scheduler, its simulated memory, and who uses it. ``close`` it."""

    def __init__(self, settings: Settings, rng: Random) -> None:
        self.settings = settings
        self.clock = Clock()
        self._patch = mock.patch.object(jaxpaged.scheduler, "time", self.clock)
        self._patch.start()
        self._logger = logging.getLogger("jaxpaged")
        self._log_level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)  # thousands of preemptions
        self.scheduler = settings.scheduler()
        self.space = self.scheduler.space
        self.pool = PoolModel(self.scheduler)
        self.plans = PlanModel(self.scheduler)
        self.stems = [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 14))] for _ in range(2)]
        self.live: dict[Request, None] = {}
        self.generations: dict[str, list[Request]] = {}
        self.launched: deque[tuple[ScheduledStep, list[list[int]]]] = deque()
        self.counts: Counter[str] = Counter()
        self.stopped_by_text: set[Request] = set()
        self.pins: dict[str, float | None] = {}  # by name, when it expires
        self._queue_deadlines: dict[str, float] = {}
        self._begun: set[str] = set()
        self._num_idle = 0

    def close(self) -> None:
        """Gives the scheduler its clock back."""
        self._patch.stop()
        self._logger.setLevel(self._log_level)

    # Requests come and go.

    def came(self, requests: list[Request]) -> None:
        """The scheduler has the first of these completions."""
        first = requests[0]
        self.generations[first.request_id] = requests
        self.live.update(dict.fromkeys(requests))
        if first.queue_deadline is not None:
            self._queue_deadlines[first.request_id] = first.queue_deadline

    def finish(self, request: Request, status: RequestStatus) -> None:
        """Ends one completion."""
        self.scheduler.finish(request, status)
        assert request.status is status
        self._ended([request])

    def _ended(self, requests: list[Request]) -> None:
        self.pool.forget(requests)
        for request in requests:
            self.live.pop(request)
            self.counts[f"finished: {request.status.value}"] += 1

    def end_generation(self, name: str, status: RequestStatus) -> None:
        """All completions of one prompt, the way the engine does it."""
        for request in self.generations[name]:
            request.forks = []
        for request in self.generations[name]:
            if not request.status.is_finished:
                self.finish(request, status)

    def _is_late(self, request: Request) -> bool:
        now, name = self.clock.now, request.request_id
        waited = name not in self._begun and self._queue_deadlines.get(name, now + 1) <= now
        return waited or (request.deadline is not None and request.deadline <= now)

    def _end_late(self) -> None:
        for request in self.scheduler.deadlines.expired(self.clock.now):
            assert request.status.is_finished or self._is_late(request), f"{request} has time left"
            self.end_generation(request.request_id, RequestStatus.FINISHED_TIMEOUT)
        assert not any(self._is_late(request) for request in self.live), "time is over and nobody says so"

    # Steps.

    def step(self, rng: Random) -> None:
        """What ``EngineCore.step`` does."""
        self._end_late()
        step = self.plan()
        if not step.rows:
            self.pool.move(step.moves)
            self.collect(0)
            return
        self._advance(step, self.pool.run(step, lambda: rng.randrange(VOCAB)))
        self.collect(int(self.settings.overlap))

    def plan(self) -> ScheduledStep:
        """The next step; its tokens can be computed, or it fails."""
        if self.scheduler.needs_tokens:
            self.collect(0)
        self.plans.before()
        must_go_on = self.scheduler.has_unfinished and not self.launched
        step = self.scheduler.schedule()
        self.plans.check(step)
        self._check_pins()
        late = [name for name, at in self.pins.items() if at is not None and at <= self.clock.now]
        assert not any(name in self.space.pins for name in late), "a pin outlives its time"
        self._num_idle = self._num_idle + 1 if must_go_on and not step.rows else 0
        assert self._num_idle < 2, "requests wait and nothing runs"
        self._begun.update(request.request_id for request, _ in step.rows)
        self.counts["steps"] += 1
        self.counts["steps of several tokens"] += step.num_steps > 1
        self.counts["steps ahead"] += bool(self.launched)
        return step

    def _advance(self, step: ScheduledStep, columns: list[list[int]]) -> None:
        self.scheduler.advance(step)
        caught_up = [index for index, token in enumerate(columns[0]) if token >= 0]
        assert step.sampling == caught_up, "a token for who has not caught up, or none for who has"
        self.plans.advanced(step)
        self.launched.append((step, columns))
        tier, loads = self.space.host, self.scheduler.next_loads()
        assert len(set(loads)) == len(loads) <= (0 if tier is None else tier.num_blocks)

    def collect(self, num_left: int) -> None:
        """Takes in the steps that are with the device but for the last ``num_left``."""
        while len(self.launched) > num_left:
            step, columns = self.launched.popleft()
            for column in columns:
                self.take(step, column)
            if len(columns) > 1:
                for request, _ in step.rows:
                    self.scheduler.publish(request)

    def take(self, step: ScheduledStep, column: list[int]) -> None:
        """One token a row."""
        sampling = [step.rows[index][0] for index in step.sampling]
        lengths = {request: request.num_tokens for request in sampling if not request.status.is_finished}
        assert self.scheduler.collect(step, column) == list(lengths)
        for request, length in lengths.items():
            assert request.num_tokens == length + 1
            self.pool.collected(request)
            self._check_ending(request)
            stops = request in self.stopped_by_text and request.token_ids[-1] == STOP_TEXT
            if stops and request in self.live:
                self.finish(request, RequestStatus.FINISHED_STOPPED)

    def _check_ending(self, request: Request) -> None:
        stopped = request.token_ids[-1] in request.eos_token_ids
        full = request.num_output_tokens == request.max_tokens and not stopped
        assert (request.status is RequestStatus.FINISHED_STOPPED) == stopped
        assert (request.status is RequestStatus.FINISHED_LENGTH) == full
        if stopped or full:
            self._ended([request])

    # Steps that fail.

    def fail(self, step: ScheduledStep) -> list[str]:
        """The step raised; the names of those that it ends."""
        wanted = [request for request, _ in step.rows if not request.status.is_finished]
        assert self.scheduler.fail(step) == wanted
        assert all(request.status is RequestStatus.FINISHED_ERROR for request in wanted)
        self.plans.failed(step)
        self._ended(wanted)
        return sorted({request.request_id for request in wanted})

    def start_over(self) -> None:
        """The content of the pool is lost, and so is every step under way."""
        self.launched.clear()
        self.scheduler.restart()
        self.pool.lose()
        self.plans.lose()

    # What must hold.

    def _check_pins(self) -> None:
        pins = self.space.pins
        cached = {self.space.cache.get(key) for key in pins.wanted} - {None}
        assert pins.blocks == cached, "a pin does not hold what is there of its prefix"

    def check(self) -> None:
        """All invariants; between operations."""
        self.scheduler.check_invariants()
        self.pool.check()
        self._check_pins()
        found = [id(request) for request in self.scheduler.requests()]
        assert sorted(found) == sorted(map(id, self.live)), "a request was lost"
        assert self.scheduler.has_unfinished == bool(self.live)
        assert len(self.launched) <= self.settings.overlap

    def finish_all(self, rng: Random) -> None:
        """Whatever has happened, everybody who is left finishes, and nothing is held in the end."""
        size = sum(request.num_tokens + request.max_tokens for request in self.live)
        limit = (MAX_PREEMPTIONS + 1) * size + 4
        while self.live or self.launched:
            self.step(rng)
            self.check()
            limit -= 1
            assert limit > 0, "requests push each other out for ever"
        for name in list(self.pins):
            self.space.pins.remove(name)
        assert self.space.num_free == self.space.allocator.num_usable, "blocks are held by nobody"
        assert self.space.host is None or self.space.host.num_held == 0, "host blocks are held by nobody"
        assert not self.pool.pending
        self.check()

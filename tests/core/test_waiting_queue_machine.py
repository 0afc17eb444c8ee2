"""The waiting queue under arbitrary use, against a naive model."""

from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxpaged.policies import Fcfs, LongestPrefixMatch, Priority, SchedulingPolicy, ShortestPromptFirst
from jaxpaged.request import Request
from jaxpaged.waiting_queue import WaitingQueue
from tests.core.waiting_requests import waiting_request

NAMES = "abcdef"


class Model:
    """The queue told plainly: a list, and a search whenever something is asked."""

    def __init__(self, policy: SchedulingPolicy, weights: dict[str, float], max_idle: int) -> None:
        self.policy, self.weights, self.max_idle = policy, weights, max_idle
        self.waiting: list[Request] = []
        self.counters: dict[str, float] = {}
        self.last_left: str | None = None

    def order(self, one: Request) -> Any:
        return self.policy.key(one), one.arrival_index, one.index

    def line(self, tenant: str) -> list[Request]:
        return sorted((one for one in self.waiting if one.tenant == tenant), key=self.order)

    def next_line(self) -> list[Request]:
        lines = [self.line(tenant) for tenant in {one.tenant for one in self.waiting}]
        return min(lines, key=lambda line: (self.counters[line[0].tenant], self.order(line[0])), default=[])

    def level(self) -> float:
        if self.waiting:
            return min(self.counters[one.tenant] for one in self.waiting)
        return 0.0 if self.last_left is None else self.counters[self.last_left]

    def push(self, one: Request) -> None:
        level = self.level()
        if not self.line(one.tenant):
            self.counters[one.tenant] = max(self.counters.get(one.tenant, level), level)
        self.waiting.append(one)

    def remove(self, one: Request) -> None:
        self.waiting.remove(one)
        if not self.line(one.tenant):
            self.last_left = one.tenant
            self.forget()

    def charge(self, one: Request, num_tokens: int) -> None:
        tenant, level = one.tenant, self.level()
        self.counters[tenant] = self.counters.get(tenant, level) + num_tokens / self.weights.get(tenant, 1.0)
        self.forget()

    def forget(self) -> None:
        idle = [tenant for tenant in self.counters if not self.line(tenant)]
        if len(idle) <= self.max_idle:
            return
        idle = sorted((tenant for tenant in idle if tenant != self.last_left), key=self.counters.__getitem__)
        for tenant in idle[: (len(idle) + 1) // 2]:
            del self.counters[tenant]


class WaitingQueueMachine(RuleBasedStateMachine):
    """Arrivals, admissions, preemptions, aborts and charges; few tenants, keys that often agree."""

    @initialize(
        policy=st.sampled_from(
            [
                Fcfs,
                lambda: Priority(aging_seconds=None),
                lambda: Priority(aging_seconds=2.0),
                lambda: ShortestPromptFirst(aging_tokens_per_second=0.0),
                lambda: LongestPrefixMatch(window=2, max_skips=2),
                lambda: LongestPrefixMatch(window=4, max_skips=1),
            ]
        ),
        weights=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([0.25, 1.0, 4.0])),
        max_idle=st.sampled_from([1, 2, 1024]),
    )
    def start(self, policy: Callable[[], SchedulingPolicy], weights: dict[str, float], max_idle: int) -> None:
        # Each has a policy of its own: that of longest prefixes remembers what it was asked.
        self.queue = WaitingQueue(policy(), weights, max_idle_tenants=max_idle)
        self.model = Model(policy(), weights, max_idle)
        self.num_arrived = 0
        self.running: list[Request] = []

    @rule(
        tenants=st.lists(st.sampled_from(NAMES), min_size=1, max_size=6),
        priority=st.integers(0, 2),
        num_tokens=st.integers(1, 3),
        n=st.sampled_from([1, 1, 2]),
    )
    def arrive(self, tenants: list[str], priority: int, num_tokens: int, n: int) -> None:
        for tenant in tenants:
            for index in reversed(range(n)):
                self.push(
                    waiting_request(
                        self.num_arrived, tenant, index=index, priority=priority, num_tokens=num_tokens
                    )
                )
            self.num_arrived += 1

    def push(self, one: Request) -> None:
        self.queue.push(one)
        self.model.push(one)

    def remove(self, one: Request) -> None:
        self.queue.remove(one)
        self.model.remove(one)

    def charge(self, one: Request, num_tokens: int) -> None:
        self.queue.charge(one, num_tokens)
        self.model.charge(one, num_tokens)

    @rule(cached=st.lists(st.integers(0, 3), min_size=4, max_size=4), num_tokens=st.integers(0, 9))
    def admit(self, cached: list[int], num_tokens: int) -> None:
        def num_cached_tokens(one: Request) -> int:
            return cached[(one.arrival_index + one.index) % 4]

        chosen = self.queue.peek(num_cached_tokens)
        line = self.model.next_line()
        window = getattr(self.model.policy, "window", 1)
        if len(line[:window]) > 1:
            assert chosen is line[self.model.policy.choose(line[:window], num_cached_tokens)]
        else:
            assert chosen is (line[0] if line else None)
        if chosen is not None:
            self.remove(chosen)
            self.charge(chosen, num_tokens)
            self.running.append(chosen)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(0, 40), again=st.booleans())
    def run_then_finish_or_preempt(self, data: st.DataObject, num_tokens: int, again: bool) -> None:
        one = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.charge(one, num_tokens)
        if again:
            one.num_preemptions += 1
            self.push(one)

    @precondition(lambda self: self.model.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.remove(data.draw(st.sampled_from(self.model.waiting)))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "queue"):
            return
        self.queue.check_invariants()
        assert len(self.queue) == len(self.model.waiting)
        assert all(one in self.queue for one in self.model.waiting)
        assert not any(one in self.queue for one in self.running)
        assert set(self.queue) == set(self.model.waiting)
        for name in NAMES:
            assert [one for one in self.queue if one.tenant == name] == self.model.line(name)
            assert self.queue.counter(name) == self.model.counters.get(name, self.model.level())


TestMachine = WaitingQueueMachine.TestCase
TestMachine.settings = hypothesis.settings(max_examples=60, stateful_step_count=40)

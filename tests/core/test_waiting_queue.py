"""The waiting queue: order, fairness across tenants, and bounds; ``test_waiting_queue_machine`` has a naive model."""

import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from jaxpaged.errors import InvalidRequestError
from jaxpaged.policies import Fcfs, LongestPrefixMatch, Priority, SchedulingPolicy, ShortestPromptFirst
from jaxpaged.request import Request
from jaxpaged.waiting_queue import WaitingQueue
from tests.core.waiting_requests import nothing_cached, waiting_request


def admit(queue: WaitingQueue, num_tokens: int = 0) -> Request | None:
    """Takes the next one out and charges it."""
    chosen = queue.peek(nothing_cached)
    if chosen is not None:
        queue.remove(chosen)
        queue.charge(chosen, num_tokens)
    queue.check_invariants()
    return chosen


def queued(*requests: Request, policy: SchedulingPolicy | None = None, **arguments: Any) -> WaitingQueue:
    queue = WaitingQueue(policy or Fcfs(), **arguments)
    for one in requests:
        queue.push(one)
    queue.check_invariants()
    return queue


class TestOneTenant:
    def test_in_order_of_keys_then_arrival_then_index(self) -> None:
        policy = Priority(aging_seconds=None)
        expected = [
            waiting_request(7, priority=0),
            waiting_request(2, priority=1, index=0),
            waiting_request(2, priority=1, index=1),
            waiting_request(3, priority=1, index=0),
            waiting_request(0, priority=2),
        ]
        queue = queued(*(expected[i] for i in (3, 4, 0, 2, 1)), policy=policy)
        assert list(queue) == expected
        assert [admit(queue) for _ in expected] == expected
        assert admit(queue) is None

    def test_a_preempted_request_comes_back_to_its_place(self) -> None:
        waiting = [waiting_request(i) for i in range(4)]
        queue = queued(*waiting)
        admitted = [admit(queue), admit(queue)]
        for one in reversed(admitted):
            assert one is not None
            queue.push(one)
        assert list(queue) == waiting

    def test_container(self) -> None:
        first, second, stranger = (waiting_request(i) for i in range(3))
        queue = queued(first, second)
        assert len(queue) == 2
        assert first in queue
        assert stranger not in queue
        assert queue.peek(nothing_cached) is first
        assert len(queue) == 2, "peek took it out"
        queue.remove(first)
        assert first not in queue
        assert len(queue) == 1
        with pytest.raises(ValueError, match="does not wait"):
            queue.remove(first)
        with pytest.raises(ValueError, match="waits already"):
            queue.push(second)
        assert list(queue) == [second]
        queue.check_invariants()

    def test_the_policy_sees_its_window_only(self) -> None:
        asked: list[Request] = []

        def cached(one: Request) -> int:
            asked.append(one)
            return one.arrival_index

        waiting = [waiting_request(i) for i in range(9)]
        queue = queued(*reversed(waiting), policy=LongestPrefixMatch(window=4))
        assert queue.peek(cached) is waiting[3]
        assert asked == waiting[:4]

    def test_a_single_one_is_not_asked_about(self) -> None:
        queue = queued(waiting_request(0), policy=LongestPrefixMatch())
        assert queue.peek(lambda _: pytest.fail("asked")) is not None

    @pytest.mark.parametrize("choice", [2, -1])
    def test_a_policy_that_chooses_nobody(self, choice: int) -> None:
        class Absurd(LongestPrefixMatch):
            def choose(self, candidates: Sequence[Request], _: Callable[[Request], int]) -> int:
                return choice

        queue = queued(waiting_request(0), waiting_request(1), policy=Absurd())
        with pytest.raises(IndexError, match=f"chose {choice} of 2 candidates"):
            queue.peek(nothing_cached)

    def test_a_key_that_fails_changes_nothing(self) -> None:
        class Failing(Fcfs):
            def key(self, request: Request) -> Any:
                return {3: 1 / (request.arrival_index - 3)} if request.arrival_index == 3 else "incomparable"

        queue = queued(waiting_request(0), waiting_request(1))
        queue._policy = Failing()
        for arrival, error in ((3, ZeroDivisionError), (4, TypeError)):
            with pytest.raises(error):
                queue.push(waiting_request(arrival))
            queue.check_invariants()
            assert len(queue) == 2

    def test_keys_without_an_order_lose_nobody(self) -> None:
        class Shuffled(Fcfs):
            def key(self, request: Request) -> Any:
                return math.nan if request.arrival_index % 3 else -request.arrival_index

        waiting = [waiting_request(i) for i in range(30)]
        queue = queued(policy=Shuffled())
        for one in waiting:
            queue.push(one)
        for count, one in enumerate(waiting[5:] + waiting[:5], 1):
            queue.remove(one)
            assert set(queue) == set((waiting[5:] + waiting[:5])[count:])

    @pytest.mark.parametrize("tenants", [1, 3000])
    def test_few_comparisons_with_ten_thousand_waiting(self, tenants: int) -> None:
        @functools.total_ordering
        class Counted:
            comparisons = 0

            def __init__(self, value: int) -> None:
                self.value = value

            def __lt__(self, other: "Counted") -> bool:
                Counted.comparisons += 1
                return self.value < other.value

            def __eq__(self, other: object) -> bool:
                Counted.comparisons += 1
                return isinstance(other, Counted) and self.value == other.value

        class Policy(Fcfs):
            def key(self, request: Request) -> Any:
                return Counted(request.arrival_index)

        queue = WaitingQueue(Policy())
        requests = [waiting_request(i, str(i % tenants)) for i in range(11_000)]
        for one in requests[:10_000]:
            queue.push(one)
        Counted.comparisons = 0
        for one in requests[10_000:]:
            queue.push(one)
            chosen = queue.peek(nothing_cached)
            assert chosen is not None
            queue.remove(chosen)
            queue.charge(chosen, 3)
        assert Counted.comparisons < 200 * 1000


class TestTenants:
    def test_the_smallest_counter_is_next(self) -> None:
        queue = queued(
            *(waiting_request(i, "a") for i in range(4)), *(waiting_request(4 + i, "b") for i in range(4))
        )
        order = [admit(queue, {"a": 10, "b": 4}[tenant]) for tenant in "abbbaba"]
        assert [one.request_id for one in order if one] == ["a0", "b4", "b5", "b6", "a1", "b7", "a2"]

    def test_priority_orders_within_a_tenant_only(self) -> None:
        queue = queued(
            waiting_request(0, "a", priority=-9),
            waiting_request(1, "a", priority=-10),
            waiting_request(2, "b", priority=9),
            policy=Priority(),
        )
        order = [admit(queue, 5) for _ in range(3)]
        assert [one.request_id for one in order if one] == ["a1", "b2", "a0"]

    def test_a_smaller_key_that_joins_decides_a_tie(self) -> None:
        a, b, sooner = waiting_request(5, "a"), waiting_request(6, "b"), waiting_request(1, "b")
        queue = queued(a, b)
        assert queue.peek(nothing_cached) is a
        queue.push(sooner)
        assert queue.peek(nothing_cached) is sooner
        queue.remove(sooner)
        assert queue.peek(nothing_cached) is a
        queue.check_invariants()

    def test_the_choice_by_cached_tokens_is_within_the_tenant_whose_turn_it_is(self) -> None:
        queue = queued(
            waiting_request(0, "a"),
            waiting_request(1, "a"),
            waiting_request(2, "b"),
            policy=LongestPrefixMatch(max_skips=9),
        )
        chosen = queue.peek(lambda one: one.arrival_index)
        assert chosen is not None
        assert chosen.request_id == "a1"

    def test_iterates_tenant_after_tenant(self) -> None:
        queue = queued(
            waiting_request(3, "a"), waiting_request(1, "b"), waiting_request(0, "a"), waiting_request(2, "b")
        )
        assert [one.request_id for one in queue] == ["a0", "a3", "b1", "b2"]

    def test_an_idle_tenant_saves_no_credit(self) -> None:
        queue = queued(*(waiting_request(i, "busy") for i in range(10)), waiting_request(10, "idle"))
        admit(queue, 100)
        assert admit(queue, 10).request_id == "idle10"  # type: ignore[union-attr]
        for _ in range(4):
            admit(queue, 100)
        assert queue.counter("idle") == 10
        queue.push(waiting_request(11, "idle"))
        assert queue.counter("idle") == queue.counter("busy") == 500

    def test_nor_when_nobody_waits(self) -> None:
        queue = queued(waiting_request(0, "busy"))
        admit(queue, 100)
        queue.charge(waiting_request(0, "busy"), 400)  # it runs, and nobody waits
        queue.push(waiting_request(1, "idle"))
        assert queue.counter("idle") == 500
        queue.check_invariants()

    def test_a_debt_is_kept_while_idle(self) -> None:
        queue = queued(waiting_request(0, "a"), waiting_request(1, "b"), waiting_request(2, "b"))
        admit(queue, 1000)
        admit(queue, 10)
        queue.push(waiting_request(3, "a"))
        assert (queue.counter("a"), queue.counter("b")) == (1000, 10)

    def test_weights_divide(self) -> None:
        queue = queued(tenant_weights={"a": 4, "b": 0.5})
        for tenant in "abc":
            queue.charge(waiting_request(0, tenant), 100)
        assert [queue.counter(tenant) for tenant in "abc"] == [25, 200, 100]

    @pytest.mark.parametrize(
        ("weights", "reason"),
        [
            (3, "must map"),
            (["a"], "must map"),
            ({1: 1.0}, "tenant 1 must be a string"),
            *(
                ({"ok": 1, "a": value}, "weight of 'a' must be positive and finite")
                for value in (0, -1.0, math.nan, math.inf, 10**400, True, "2", None)
            ),
        ],
    )
    def test_bad_weights(self, weights: Any, reason: str) -> None:
        with pytest.raises(InvalidRequestError, match=reason) as caught:
            WaitingQueue(Fcfs(), weights)
        assert caught.value.argument == "tenant_weights"


class TestForgetting:
    def test_made_up_names_are_forgotten(self) -> None:
        queue = WaitingQueue(Fcfs())
        for i in range(5000):
            queue.push(waiting_request(i, f"new {i}"))
            admit_one = queue.peek(nothing_cached)
            assert admit_one is not None
            queue.remove(admit_one)
            queue.charge(waiting_request(i, f"only charged {i}"), 1)
            assert len(queue._tenants) <= 1024
        queue.check_invariants()

    def test_waiting_tenants_are_never_forgotten(self) -> None:
        queue = queued(*(waiting_request(i, str(i)) for i in range(100)), max_idle_tenants=1)
        assert [admit(queue, 1).arrival_index for _ in range(100)] == list(range(100))  # type: ignore[union-attr]

    def test_the_largest_debts_are_kept(self) -> None:
        queue = WaitingQueue(Fcfs(), max_idle_tenants=8)
        for i in (3, 8, 1, 6, 2, 7, 5, 4, 0):
            queue.charge(waiting_request(i, str(i)), i)
            queue.check_invariants()
        assert [queue.counter(str(i)) for i in range(9)] == [0, 0, 0, 0, 0, 5, 6, 7, 8]

    def test_what_a_forgotten_one_that_runs_is_charged_counts(self) -> None:
        queue = queued(waiting_request(0, "busy"), max_idle_tenants=1)
        queue.charge(waiting_request(0, "busy"), 1000)
        for name in ("runs", "other", "other 2", "runs"):
            queue.charge(waiting_request(1, name), 7)
        queue.push(waiting_request(2, "runs"))
        assert queue.counter("runs") == 1007


class Server:
    """As many requests at once as it has rows; a prompt takes one step, then each step one token."""

    def __init__(self, queue: WaitingQueue, num_rows: int, num_output: int) -> None:
        self.queue, self.num_rows, self.num_output = queue, num_rows, num_output
        self.running: list[list[Any]] = []
        self.served: dict[str, int] = {}

    def give(self, one: Request, num_tokens: int) -> None:
        self.queue.charge(one, num_tokens)
        self.served[one.tenant] = self.served.get(one.tenant, 0) + num_tokens

    def step(self) -> None:
        for entry in self.running:
            self.give(entry[0], 1)
            entry[1] -= 1
        self.running = [entry for entry in self.running if entry[1] > 0]
        while len(self.running) < self.num_rows and (chosen := self.queue.peek(nothing_cached)) is not None:
            self.queue.remove(chosen)
            self.give(chosen, chosen.num_prompt_tokens)
            self.running.append([chosen, self.num_output])
        self.queue.check_invariants()


def flood(queue: WaitingQueue, tenant: str, count: int, num_tokens: int, start: int) -> None:
    for i in range(count):
        queue.push(waiting_request(start + i, tenant, num_tokens=num_tokens))


class TestFairness:
    @pytest.mark.parametrize("weights", [{}, {"small": 3.0}, {"flood": 2.5, "small": 0.5}])
    @pytest.mark.parametrize("policy", [Fcfs(), Priority(), ShortestPromptFirst(), LongestPrefixMatch()])
    def test_backlogged_tenants_get_their_shares(
        self, policy: SchedulingPolicy, weights: dict[str, float]
    ) -> None:
        queue = WaitingQueue(policy, weights)
        flood(queue, "flood", 400, num_tokens=20, start=0)
        flood(queue, "small", 60, num_tokens=5, start=1000)
        server, num_steps = Server(queue, num_rows=4, num_output=8), 0
        # The paper's bound: twice what can be given between two decisions, here all rows' tokens.
        bound = 2 * 4 * (20 + 8) / min(weights.get("flood", 1.0), weights.get("small", 1.0))
        while any(one.tenant == "small" for one in queue):
            server.step()
            num_steps += 1
            got = [server.served.get(name, 0) / weights.get(name, 1.0) for name in ("flood", "small")]
            assert abs(got[0] - got[1]) <= bound
        assert num_steps > 40
        assert sum(one.tenant == "flood" for one in queue) > 0

    def test_a_late_tenant_gets_half_from_then_on_and_no_more(self) -> None:
        queue = WaitingQueue(Fcfs())
        flood(queue, "early", 500, num_tokens=10, start=0)
        server = Server(queue, num_rows=4, num_output=6)
        for _ in range(100):
            server.step()
        before = dict(server.served)
        flood(queue, "late", 500, num_tokens=10, start=1000)
        for _ in range(100):
            server.step()
        early, late = server.served["early"] - before["early"], server.served["late"]
        assert abs(early - late) <= 2 * 4 * (10 + 6)
        assert early > 300

    def test_no_tenant_starves_among_many(self) -> None:
        queue = WaitingQueue(Fcfs())
        flood(queue, "flood", 500, num_tokens=10, start=0)
        for i in range(50):
            queue.push(waiting_request(1000 + i, f"tenant {i}"))
        server = Server(queue, num_rows=4, num_output=4)
        for _ in range(70):
            server.step()
        assert len(server.served) == 51
        assert all(one.tenant == "flood" for one in queue)


def test_many_tenants_and_smaller_and_smaller_keys() -> None:
    """Every push makes a dead place, and the heap of places stays bounded."""

    class Lifo(Fcfs):
        def key(self, request: Request) -> int:
            return -request.arrival_index

    rng = random.Random(0)
    queue = WaitingQueue(Lifo())
    waiting = [waiting_request(i, rng.choice("abcdef")) for i in range(500)]
    for one in waiting:
        queue.push(one)
    queue.check_invariants()
    rng.shuffle(waiting)
    for one in waiting:
        queue.remove(one)
        queue.check_invariants()
    assert len(queue) == 0

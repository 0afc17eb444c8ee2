"""What each policy decides, and what is accepted as one."""

import gc
import math
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxpaged.errors import InvalidRequestError
from jaxpaged.policies import (
    POLICIES,
    Fcfs,
    LongestPrefixMatch,
    Priority,
    SchedulingPolicy,
    ShortestPromptFirst,
    policy_from,
)
from jaxpaged.request import Request
from jaxpaged.waiting_queue import WaitingQueue
from tests.core.waiting_requests import nothing_cached, waiting_request


def in_order(policy: SchedulingPolicy, requests: Sequence[Request]) -> list[Request]:
    return sorted(requests, key=policy.key)


class TestFcfs:
    def test_by_arrival(self) -> None:
        first, second, third = (
            waiting_request(i, at=9.0 - i, priority=-i, num_tokens=9 - i) for i in range(3)
        )
        assert in_order(Fcfs(), [third, first, second]) == [first, second, third]

    def test_the_last_to_arrive_gives_way_the_last_completion_first(self) -> None:
        older, *completions = (
            waiting_request(1),
            waiting_request(2, index=0),
            waiting_request(2, index=2),
            waiting_request(2, index=1),
        )
        assert Fcfs().victim([*completions, older]) is completions[1]
        assert Fcfs().victim([older]) is older


class TestPriority:
    def test_smaller_goes_first_and_larger_gives_way(self) -> None:
        low, high, middle = (
            waiting_request(0, priority=5),
            waiting_request(1, priority=-3),
            waiting_request(2, priority=1),
        )
        assert in_order(Priority(), [low, high, middle]) == [high, middle, low]
        assert Priority().victim([low, high, middle]) is low

    @pytest.mark.parametrize("policy", [Priority(), Priority(aging_seconds=None)])
    def test_of_equals_the_later_gives_way(self, policy: Priority) -> None:
        same = [waiting_request(arrival, index=i, at=0.0) for arrival, i in ((3, 2), (4, 0), (4, 1))]
        assert policy.victim([same[2], same[0], same[1]]) is same[2]

    def test_a_level_for_each_aging_seconds(self) -> None:
        policy = Priority(aging_seconds=10.0)
        waits = waiting_request(0, priority=2, at=100.0)
        assert policy.key(waits) < policy.key(waiting_request(1, priority=0, at=120.1))
        assert policy.key(waits) > policy.key(waiting_request(1, priority=0, at=119.9))

    def test_no_aging_is_the_plain_priority(self) -> None:
        policy = Priority(aging_seconds=None)
        assert policy.key(waiting_request(0, priority=2, at=0.0)) > policy.key(
            waiting_request(1, priority=1, at=1e9)
        )

    @pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "60", True])
    def test_bad_aging(self, value: Any) -> None:
        with pytest.raises(InvalidRequestError, match=r"aging_seconds=.*positive and finite"):
            Priority(aging_seconds=value)


class TestShortestPromptFirst:
    def test_shorter_goes_first_and_longest_gives_way(self) -> None:
        long, short, middle = (
            waiting_request(0, num_tokens=9, at=0.0),
            waiting_request(1, num_tokens=1, at=0.0),
            waiting_request(2, num_tokens=5, at=0.0),
        )
        policy = ShortestPromptFirst()
        assert in_order(policy, [long, short, middle]) == [short, middle, long]
        assert policy.victim([long, short, middle]) is long

    def test_output_does_not_make_a_prompt_longer(self) -> None:
        policy, one = ShortestPromptFirst(), waiting_request(0)
        key = policy.key(one)
        one.append(7)
        assert policy.key(one) == key

    def test_tokens_for_each_second(self) -> None:
        policy = ShortestPromptFirst(aging_tokens_per_second=2.0)
        waits = waiting_request(0, num_tokens=25, at=100.0)
        assert policy.key(waits) < policy.key(waiting_request(1, num_tokens=5, at=110.1))
        assert policy.key(waits) > policy.key(waiting_request(1, num_tokens=5, at=109.9))
        assert ShortestPromptFirst(aging_tokens_per_second=0).key(waits) == 25

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, None, False])
    def test_bad_aging(self, value: Any) -> None:
        with pytest.raises(InvalidRequestError, match=r"aging_tokens_per_second=.*at least 0 and finite"):
            ShortestPromptFirst(aging_tokens_per_second=value)


def seconds_until_admitted(
    policy: SchedulingPolicy, patient: Request, rival: Callable[[int], Request]
) -> int:
    """One rival arrives and one request is admitted each second; 1000 when ``patient`` never is."""
    queue = WaitingQueue(policy)
    queue.push(patient)
    for second in range(1, 1000):
        queue.push(rival(second))
        admitted = queue.peek(nothing_cached)
        assert admitted is not None
        queue.remove(admitted)
        if admitted is patient:
            return second
    return 1000


class TestStarvation:
    @pytest.mark.parametrize(("aging_seconds", "expected"), [(10.0, 50), (None, 1000)])
    def test_priority(self, aging_seconds: float | None, expected: int) -> None:
        policy = Priority(aging_seconds=aging_seconds)
        rival = lambda second: waiting_request(second, priority=0, at=1e6 + second)  # noqa: E731
        assert seconds_until_admitted(policy, waiting_request(0, priority=5, at=1e6), rival) == expected

    @pytest.mark.parametrize(("rate", "expected"), [(2.0, 60), (0.0, 1000)])
    def test_shortest_prompt_first(self, rate: float, expected: int) -> None:
        policy = ShortestPromptFirst(aging_tokens_per_second=rate)
        rival = lambda second: waiting_request(second, num_tokens=5, at=1e6 + second)  # noqa: E731
        assert seconds_until_admitted(policy, waiting_request(0, num_tokens=125, at=1e6), rival) == expected


class TestLongestPrefixMatch:
    def choose(self, policy: LongestPrefixMatch, candidates: Sequence[Request], cached: Sequence[int]) -> int:
        counts = dict(zip(candidates, cached, strict=True))
        return policy.choose(candidates, counts.__getitem__)

    def test_most_cached_tokens_then_the_first(self) -> None:
        policy, waiting = LongestPrefixMatch(), [waiting_request(i) for i in range(4)]
        assert self.choose(policy, waiting, [0, 8, 16, 16]) == 2
        assert self.choose(policy, waiting, [4, 4, 0, 4]) == 0

    def test_by_arrival_and_the_last_gives_way(self) -> None:
        policy, waiting = LongestPrefixMatch(), [waiting_request(i) for i in range(3)]
        assert in_order(policy, waiting[::-1]) == waiting
        assert policy.victim(waiting[::-1]) is waiting[2]

    def skips_of_the_first(self, policy: LongestPrefixMatch, *, asked: int = 1) -> int:
        """How many that have more cached are admitted before the first; each is chosen ``asked`` times."""
        first, passed = waiting_request(0), 0
        while passed < 100:
            rival = waiting_request(passed + 1)
            chosen = {self.choose(policy, [first, rival], [0, 16]) for _ in range(asked)}
            assert len(chosen) == 1
            if chosen == {0}:
                break
            passed += 1
        return passed

    @pytest.mark.parametrize("max_skips", [0, 1, 5])
    @pytest.mark.parametrize("asked", [1, 4])
    def test_the_first_is_skipped_so_often_and_then_next(self, max_skips: int, asked: int) -> None:
        assert self.skips_of_the_first(LongestPrefixMatch(max_skips=max_skips), asked=asked) == max_skips

    def test_nobody_is_asked_about_when_the_first_is_due(self) -> None:
        asked: list[Request] = []
        choice = LongestPrefixMatch(max_skips=0).choose(
            [waiting_request(0), waiting_request(1)], lambda r: asked.append(r) or 0
        )
        assert (choice, asked) == (0, [])

    def test_queues_that_take_turns_keep_their_counts(self) -> None:
        policy, heads, passed = (
            LongestPrefixMatch(max_skips=3),
            [waiting_request(0), waiting_request(1)],
            [0, 0],
        )
        for i in range(20):
            passed[i % 2] += self.choose(policy, [heads[i % 2], waiting_request(2 + i)], [0, 16])
        assert passed == [3, 3]

    def test_one_that_was_admitted_preempted_and_chosen_again_counts_twice(self) -> None:
        policy, first, rival = LongestPrefixMatch(max_skips=3), waiting_request(0), waiting_request(1)
        for expected in (1, 1, 1, 0):
            assert self.choose(policy, [first, rival], [0, 16]) == expected
            rival.num_preemptions += 1

    def test_a_later_choice_of_the_first_forgets_who_was_chosen_but_not_admitted(self) -> None:
        policy, first, rival = LongestPrefixMatch(max_skips=1), waiting_request(0), waiting_request(1)
        assert self.choose(policy, [first, rival], [0, 16]) == 1
        assert self.choose(policy, [first, rival], [0, 0]) == 0  # by now the cache has lost it
        assert (
            self.choose(policy, [first, waiting_request(2)], [0, 16]) == 1
        )  # so nobody has passed the first so far

    def test_holds_no_request(self) -> None:
        policy = LongestPrefixMatch()
        waiting = [waiting_request(0), waiting_request(1)]
        self.choose(policy, waiting, [0, 16])
        alive = [weakref.ref(one) for one in waiting]
        del waiting
        gc.collect()
        assert [one() for one in alive] == [None, None]
        assert len(policy._skips) == 0

    @pytest.mark.parametrize(
        "arguments",
        [{"window": 0}, {"window": True}, {"window": 2.0}, {"max_skips": -1}, {"max_skips": None}],
    )
    def test_bad_arguments(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(
            InvalidRequestError, match=f"{next(iter(arguments))}=.*must be an integer of at least"
        ):
            LongestPrefixMatch(**arguments)


class Lifo:
    """Last come, first served: a user's own policy, without a window."""

    def key(self, request: Request) -> int:
        return -request.arrival_index

    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        return 0

    def victim(self, running: Sequence[Request]) -> Request:
        return running[0]


class WithArgument(Lifo):
    def __init__(self, argument: int) -> None:
        self.argument = argument


class BadWindow(Lifo):
    window: Any = 0


class NoMethods:
    key = 3  # not callable
    victim = Lifo.victim


class ForgotVictim(SchedulingPolicy):
    key = Lifo.key
    choose = Lifo.choose


instance = Lifo()


class TestPolicyFrom:
    @pytest.mark.parametrize("name", POLICIES)
    def test_names(self, name: str) -> None:
        policy = policy_from(name)
        assert type(policy) is POLICIES[name]
        one = waiting_request(0)
        assert policy.victim([one]) is one

    @pytest.mark.parametrize("name", ["Lifo", "instance"])
    def test_dotted_name(self, name: str) -> None:
        assert isinstance(policy_from(f"{__name__}.{name}"), sys.modules[__name__].Lifo)

    def test_class_and_instance(self) -> None:
        assert isinstance(policy_from(Lifo), Lifo)
        assert policy_from(instance) is instance
        assert policy_from(policy := LongestPrefixMatch(window=2)) is policy

    @pytest.mark.parametrize(
        ("spec", "reason"),
        [
            (
                "",
                "must be one of fcfs, priority, shortest-prompt-first, longest-prefix-match, or a dotted name",
            ),
            ("FCFS", "must be one of"),
            ("no_such_module_here.Policy", "cannot be imported: ModuleNotFoundError"),
            (".policies.Fcfs", "cannot be imported: TypeError"),
            ("jaxpaged.policies.Missing", "cannot be imported: AttributeError.*Missing"),
            ("jaxpaged.policies.math", "no method key, choose, victim"),
            ("jaxpaged.policies.Fcfs.key", "cannot be imported: ModuleNotFoundError"),
            (WithArgument, "cannot be built without arguments: .*argument"),
            (SchedulingPolicy, "cannot be built without arguments"),
            (ForgotVictim, "cannot be built without arguments: .*victim"),
            (NoMethods, "no method key, choose$"),
            (NoMethods(), "no method key, choose$"),
            (BadWindow, "window must be an integer of at least 1, not 0"),
            (None, "no method key, choose, victim"),
            (7, "no method key, choose, victim"),
        ],
    )
    def test_anything_else(self, spec: object, reason: str) -> None:
        with pytest.raises(InvalidRequestError, match=reason) as caught:
            policy_from(spec)
        assert caught.value.argument == "scheduling_policy"
        assert caught.value.value is spec

    @pytest.mark.parametrize("window", [1.0, True, "3", None, -2])
    def test_bad_window(self, window: Any) -> None:
        policy = BadWindow()
        policy.window = window
        with pytest.raises(InvalidRequestError, match="window"):
            policy_from(policy)

    def test_a_module_that_raises(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "broken_policy.py").write_text("1 / 0\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(InvalidRequestError, match="cannot be imported: ZeroDivisionError"):
            policy_from("broken_policy.Policy")

"""How requests are treated beside each other: order, fairness, time, memory that runs short; never their tokens."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from jaxpaged import Engine, RequestOutput, RequestOutputKind
from jaxpaged.errors import InvalidRequestError
from jaxpaged.memory_monitor import MemoryLevel
from jaxpaged.policies import Fcfs, Priority
from jaxpaged.request import Request
from tests.engine.family import FULL, PARAMS, PROMPTS, Clock, core_of, sibling, unburdened
from tests.engine.test_bad_input import check_refused
from tests.engine.tiny import GREEDY, SIZES, dense_greedy, drain, prompt_of, tiny_decoder, tokens_of

NAN = float("nan")
ONE_BY_ONE = 16  # a prompt of so many tokens takes a whole step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class LastComeFirst:
    """A policy of the user's."""

    def key(self, request: Request) -> int:
        return -request.arrival_index

    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        return 0

    def victim(self, running: Sequence[Request]) -> Request:
        return max(running, key=self.key)


def arrivals(engine: Engine) -> list[str]:
    """Runs everything; the names in the order of their first tokens."""
    order: dict[str, None] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            order.setdefault(output.request_id)
        engine.check_invariants()
    return list(order)


# Order.


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("fcfs", "abcd"),
        ("priority", "bdac"),
        ("shortest-prompt-first", "dacb"),
        (LastComeFirst, "dcba"),
        (LastComeFirst(), "dcba"),
        ("tests.engine.test_handling.LastComeFirst", "dcba"),
        (Priority(aging_seconds=None), "bdac"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("ahead", [False, True])
def test_the_policy_says_who_comes_first(policy: Any, wanted: str, ahead: bool) -> None:
    # Name to length of the prompt and priority. Each takes at least what is left of a step.
    requests = {"a": (17, 1), "b": (20, -5), "c": (18, 1), "d": (16, 0)}
    with sibling(scheduling_policy=policy, async_scheduling=ahead) as engine:
        engine.add_request("before", prompt_of(ONE_BY_ONE), GREEDY.clone(max_tokens=1))
        for name, (length, priority) in requests.items():
            engine.add_request(name, prompt_of(length), GREEDY.clone(max_tokens=1), priority=priority)
        order = [name for name in arrivals(engine) if name != "before"]
        assert "".join(order) == wanted


def test_the_longest_cached_prefix_comes_first() -> None:
    with sibling(scheduling_policy="longest-prefix-match") as engine:
        cached = prompt_of(24)
        engine.generate(cached, GREEDY)
        engine.add_request("stranger", prompt_of(30, seed=1), GREEDY)
        engine.add_request("part", [*cached[:8], *prompt_of(20, seed=2)], GREEDY)
        engine.add_request("all of it", [*cached, *prompt_of(20, seed=3)], GREEDY)
        assert arrivals(engine) == ["all of it", "part", "stranger"]


def test_who_waits_gains_on_who_comes_later(clock: Clock) -> None:
    with sibling(scheduling_policy=Priority(aging_seconds=10.0)) as engine:
        engine.add_request("old", prompt_of(ONE_BY_ONE), GREEDY, priority=5)
        clock.ahead = 45.0
        engine.add_request("urgent", prompt_of(ONE_BY_ONE, seed=1), GREEDY, priority=0)
        clock.ahead = 55.0
        engine.add_request("too late", prompt_of(ONE_BY_ONE, seed=2), GREEDY, priority=0)
        assert arrivals(engine) == ["urgent", "old", "too late"]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_least_urgent_gives_way(ahead: bool) -> None:
    arguments = {"async_scheduling": ahead, "num_host_blocks": 60, **FULL}
    with sibling(scheduling_policy="priority", **arguments) as engine:
        for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
            engine.add_request(str(i), prompt, params, priority=-i)
        last = drain(engine)
        assert engine.stats().num_preemptions > 0
        for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
            output = last[str(i)]
            assert output.outputs[0].token_ids == dense_greedy(prompt, params.max_tokens or 0)
        pushed = [(last[str(i)].metrics.num_preemptions, i) for i in range(8)]  # type: ignore[union-attr]
        assert pushed[7][0] == 0
        assert sum(count for count, i in pushed if i < 4) > sum(count for count, i in pushed if i >= 4)


@pytest.mark.parametrize(
    "policy", ["fcfs", "priority", "shortest-prompt-first", "longest-prefix-match", LastComeFirst]
)
@pytest.mark.parametrize("ahead", [False, True])
def test_no_policy_changes_a_token(policy: Any, ahead: bool) -> None:
    arguments = {"async_scheduling": ahead, "num_host_blocks": 30, "preemption_mode": "swap", **FULL}
    with sibling(scheduling_policy=policy, tenant_weights={"a": 3.0}, **arguments) as engine:
        for k, (i, (prompt, params)) in itertools.product(
            range(2), enumerate(zip(PROMPTS, PARAMS, strict=True))
        ):
            name = f"{k}.{i}"
            engine.add_request(name, prompt, params.clone(n=1 + k), priority=i % 3, tenant="abc"[i % 3])
        last = drain(engine)
        assert engine.stats().num_preemptions > 0
        for k, (i, (prompt, params)) in itertools.product(
            range(2), enumerate(zip(PROMPTS, PARAMS, strict=True))
        ):
            wanted = dense_greedy(prompt, params.max_tokens or 0)
            assert [c.token_ids for c in last[f"{k}.{i}"].outputs] == [wanted] * (1 + k)


def test_a_policy_that_raises_loses_nothing() -> None:
    """It is the user's own mistake, and what step() raises; who goes on gets every token."""

    class Moody(Fcfs):
        window = 8
        calls = 0

        def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
            Moody.calls += 1
            if Moody.calls % 5 == 3:
                raise ZeroDivisionError("a bad mood")
            return 0

    with sibling(scheduling_policy=Moody(), async_scheduling=True, **FULL) as engine:
        for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
            engine.add_request(str(i), prompt, params.clone(output_kind=RequestOutputKind.DELTA))
        got: dict[str, list[int]] = {str(i): [] for i in range(8)}
        raised = 0
        while engine.has_unfinished_requests:
            try:
                outputs = engine.step()
            except ZeroDivisionError:
                raised += 1
                continue
            for output in outputs:
                got[output.request_id] += output.outputs[0].token_ids
            engine.check_invariants()
        assert raised > 0
        assert list(got.values()) == [
            dense_greedy(prompt, params.max_tokens or 0)
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]


# Tenants.


@pytest.mark.parametrize(
    ("weights", "wanted"), [(None, {"a": 6, "b": 6}), ({"a": 3.0}, {"a": 9, "b": 3})], ids=["equal", "3 to 1"]
)
@pytest.mark.parametrize("ahead", [False, True])
def test_tenants_get_their_shares(weights: Any, wanted: dict[str, int], ahead: bool) -> None:
    """One fills the queue before the other comes; each request is one step's work."""
    with sibling(tenant_weights=weights, async_scheduling=ahead, enable_prefix_caching=False) as engine:
        for tenant in "ab":
            for i in range(12):
                name = f"{tenant}{i}"
                engine.add_request(name, prompt_of(ONE_BY_ONE, i), GREEDY.clone(max_tokens=1), tenant=tenant)
        order = arrivals(engine)
        assert len(order) == 24
        assert Counter(name[0] for name in order[:12]) == wanted
        assert [name for name in order if name[0] == "a"] == [f"a{i}" for i in range(12)]


def test_nobody_pays_for_having_no_name() -> None:
    """Requests without a tenant are one tenant."""
    with sibling(enable_prefix_caching=False) as engine:
        for i in range(6):
            engine.add_request(str(i), prompt_of(ONE_BY_ONE, i), GREEDY.clone(max_tokens=1))
        engine.add_request("named", prompt_of(ONE_BY_ONE, 7), GREEDY.clone(max_tokens=1), tenant="x")
        assert arrivals(engine).index("named") <= 2


# Time.


@pytest.fixture(scope="module", params=[False, True], ids=["in step", "ahead"])
def engine_for_all(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with sibling(
        async_scheduling=request.param, num_host_blocks=60, preemption_mode="swap", **FULL
    ) as engine:
        yield engine


@pytest.fixture
def engine(engine_for_all: Engine) -> Iterator[Engine]:
    with unburdened(engine_for_all) as found:
        yield found


def reasons(output: RequestOutput) -> list[str | None]:
    return [completion.finish_reason for completion in output.outputs]


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_a_deadline_ends_a_request_with_what_it_has(
    engine: Engine, clock: Clock, kind: RequestOutputKind
) -> None:
    late = engine.stats().finished.get("timeout", 0)
    params = GREEDY.clone(max_tokens=30, n=2, output_kind=kind)
    engine.add_request("late", prompt_of(9), params, deadline=10.0)
    engine.add_request("in time", prompt_of(7), GREEDY, deadline=1000.0)
    got: list[list[int]] = [[], []]

    def take(outputs: list[RequestOutput]) -> list[str | None]:
        for output in outputs:
            if output.request_id == "late":
                for c in output.outputs:
                    got[c.index] = (
                        got[c.index] + c.token_ids if kind is RequestOutputKind.DELTA else c.token_ids
                    )
                return reasons(output) if output.finished else []
        return []

    for _ in range(6):
        assert take(engine.step()) == []
    clock.ahead = 11.0
    (parent,) = [core_of(engine).generations["late"]]
    known = [completion.request.num_output_tokens for completion in parent.completions]
    outputs = engine.step()
    assert take(outputs) == ["timeout"] * 2
    assert [len(tokens) for tokens in got] == known
    assert all(tokens == dense_greedy(prompt_of(9), 30)[: len(tokens)] for tokens in got)
    assert "late" not in engine.block_tables()
    engine.check_invariants()
    for output in outputs:
        if output.request_id == "in time" and output.finished:
            assert output.outputs[0].token_ids == dense_greedy(prompt_of(7), 16)
    last = drain(engine)
    if "in time" in last:
        assert last["in time"].outputs[0].token_ids == dense_greedy(prompt_of(7), 16)
    assert engine.stats().finished["timeout"] - late == 2


def test_a_deadline_holds_for_every_completion(engine: Engine, clock: Clock) -> None:
    """Also when the first one has ended before."""
    params = GREEDY.clone(n=2, temperature=1.0, seed=1, max_tokens=60)
    (free,) = engine.generate(prompt_of(5), params)
    stop = next(t for t in free.outputs[0].token_ids if t not in free.outputs[1].token_ids)
    engine.add_request("x", prompt_of(5), params.clone(stop_token_ids=[stop]), deadline=10.0)
    first = core_of(engine).generations["x"].completions[0]
    while not first.finished:
        engine.step()
    assert "x" in engine.block_tables()
    clock.ahead = 11.0
    (output,) = engine.step()
    assert reasons(output) == ["stop", "timeout"]


def test_deadlines_of_those_that_wait(engine: Engine, clock: Clock) -> None:
    """Never begun, preempted or swapped out."""
    for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        engine.add_request(str(i), prompt, params, deadline=10.0 if i % 2 else None)
    swaps = core_of(engine).scheduler.preemption.num_preemptions
    while core_of(engine).scheduler.preemption.num_preemptions == swaps:
        engine.step()
    for i in range(8, 14):
        engine.add_request(str(i), prompt_of(9), GREEDY, deadline=5.0)
    clock.ahead = 11.0
    last = drain(engine)
    for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        if str(i) in last and reasons(last[str(i)]) != ["timeout"]:
            assert last[str(i)].outputs[0].token_ids == dense_greedy(prompt, params.max_tokens or 0)
            assert i % 2 == 0 or params.max_tokens == len(last[str(i)].outputs[0].token_ids)
    assert {i for i in range(14) if str(i) in last and reasons(last[str(i)]) == ["timeout"]} >= {
        7,
        *range(8, 14),
    }


def test_waiting_too_long(engine: Engine, clock: Clock) -> None:
    for i in range(8):  # all rows
        engine.add_request(str(i), prompt_of(6, seed=i), GREEDY.clone(max_tokens=12), max_queue_time=20.0)
    engine.add_request("patient", prompt_of(5), GREEDY, max_queue_time=1000.0)
    engine.add_request("impatient", prompt_of(7), GREEDY, max_queue_time=10.0)
    for _ in range(4):
        engine.step()
    clock.ahead = 11.0
    (ended,) = [output for output in engine.step() if output.finished]
    assert (ended.request_id, reasons(ended)) == ("impatient", ["timeout"])
    assert ended.outputs[0].token_ids == []
    clock.ahead = 100.0  # those that run have nothing to do with it
    last = drain(engine)
    for i in range(8):
        assert last[str(i)].outputs[0].token_ids == dense_greedy(prompt_of(6, seed=i), 12)
    assert last["patient"].outputs[0].token_ids == dense_greedy(prompt_of(5), 16)


def test_who_has_run_no_longer_waits_in_the_queue(engine: Engine, clock: Clock) -> None:
    """Preempted after its longest time in the queue, it goes on."""
    for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        engine.add_request(str(i), prompt, params.clone(n=2 if i == 0 else 1), max_queue_time=1e4)
    before = engine.stats().num_preemptions
    while engine.stats().num_preemptions == before:
        engine.step()
    clock.ahead = 1e5
    never = {r.request_id for r in core_of(engine).scheduler.waiting if r.num_preemptions == 0}
    last = drain(engine)
    for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        if str(i) in never:
            assert reasons(last[str(i)]) == ["timeout"]
        else:
            assert last[str(i)].outputs[0].token_ids == dense_greedy(prompt, params.max_tokens or 0)


# Memory.


def test_a_warning_keeps_newcomers_out() -> None:
    """While half of the pool is in use nobody is admitted beside those that run; without it somebody is pushed out."""
    found = []
    for warning in (1.0, 0.5):
        with sibling(memory_warning=warning, memory_critical=1.0) as engine:
            outputs = engine.generate(PROMPTS, PARAMS)
            assert tokens_of(outputs) == [
                dense_greedy(prompt, params.max_tokens or 0)
                for prompt, params in zip(PROMPTS, PARAMS, strict=True)
            ]
            found.append(engine.stats().num_preemptions)
            monitor = core_of(engine).scheduler.monitor
            assert monitor is not None
            assert (monitor.num_transitions[MemoryLevel.WARNING] > 0) == (warning < 1)
    assert found[0] > found[1]


def test_critical_memory_halves_the_steps() -> None:
    with sibling(memory_warning=0.3, memory_critical=0.3, num_scheduler_steps=1) as engine:
        engine.add_request("long", prompt_of(100), GREEDY)
        engine.add_request("other", prompt_of(9), GREEDY)
        sizes = []
        while engine.has_unfinished_requests:
            before = engine.stats().num_tokens
            engine.step()
            sizes.append(engine.stats().num_tokens - before)
        # 30 % of 39 blocks are 11.7; with 16 tokens a step that is after the third.
        assert sizes[:12] == [16] * 3 + [8] * 6 + [4] + [1] * 2


# Mistakes.

BAD_HANDLING: list[tuple[str, Any]] = [
    *itertools.product(["priority"], [1.5, "1", True, None, 2**40, -(2**40), NAN]),
    *itertools.product(["tenant"], [5, None, b"x", "x" * 257]),
    *itertools.product(["cache_salt"], [5, b"x"]),
    *itertools.product(["deadline", "max_queue_time"], [0, 0.0, -1.0, NAN, float("inf"), "1", True, [1]]),
]

BAD_ARGUMENTS: list[tuple[str, Any]] = [
    *itertools.product(["scheduling_policy"], ["lifo", "", 5, "no.such.Module", "os.path.Nothing", [], 3.5]),
    *itertools.product(
        ["tenant_weights"],
        [5, "ab", [1], {"a": 0}, {"a": -1.0}, {"a": NAN}, {"a": "1"}, {"a": True}, {1: 1.0}],
    ),
    *itertools.product(["preemption_mode"], ["swapping", "", 5, True, ["swap"]]),
    *itertools.product(["swap_space"], [-1, -0.5, NAN, float("inf"), "4", True, 1e9]),
    *itertools.product(["num_host_blocks"], [-1, 1.5, True, "4"]),
    *itertools.product(["async_scheduling"], [1, "yes", 0.0]),
    *itertools.product(["memory_warning", "memory_critical"], [0, -0.1, 1.1, NAN, "0.5", True]),
    ("memory_critical", 0.5),  # below memory_warning
]


def test_bad_handling_names_argument_and_value(engine: Engine) -> None:
    engine.add_request("live", prompt_of(9), GREEDY)
    engine.step()
    for name, value in BAD_HANDLING:
        shown = re.escape(repr(value)[:20])
        check_refused(
            engine,
            lambda e, n=name, v=value: e.add_request("new", [3], **{n: v}),
            f"^{name}={shown}",
            InvalidRequestError,
        )
    assert drain(engine)["live"].outputs[0].token_ids == dense_greedy(prompt_of(9), 16)


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS, ids=repr)
def test_bad_arguments_of_the_constructor(name: str, value: Any) -> None:
    shown = re.escape(repr(value)[:20])
    with pytest.raises(InvalidRequestError, match=f"^{name}={shown}"):
        Engine(tiny_decoder(), **{**SIZES, name: value})

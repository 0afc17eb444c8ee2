"""An engine's thread from its start to its end, and what befalls those who wait meanwhile."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from jaxpaged import Engine
from jaxpaged.errors import EngineClosedError
from jaxpaged.policies import Fcfs
from jaxpaged.request import Request
from jaxpaged.serve.engine_state import EngineState, StartProgress
from jaxpaged.serve.engine_thread import (
    EngineDeadError,
    EngineDrainingError,
    EngineNotReadyError,
    EngineThread,
)
from tests.engine.tiny import dense_greedy, prompt_of
from tests.serve.asynchronous import TIMEOUT, wait_until
from tests.serve.served_engines import (
    LONG,
    Broken,
    Served,
    break_steps,
    held,
    poisoned,
    reasons,
    tiny,
)
from tests.support.repository import ROOT


class SlowStart:
    """Makes an engine when it is told to, and tells progress before and after."""

    def __init__(self) -> None:
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.made: list[Engine] = []

    def __call__(self, tell: Callable[[StartProgress], None]) -> Engine:
        tell(StartProgress("compiling", 1, 5, 0.5))
        self.begun.set()
        assert self.goes_on.wait(TIMEOUT)
        tell(StartProgress("compiling", 5, 5, 1.0))
        self.made.append(tiny())
        return self.made[-1]


def test_an_engine_that_starts_says_how_far_it_is() -> None:
    start = SlowStart()
    served = Served(EngineThread(start))
    assert start.begun.wait(TIMEOUT)
    assert served.thread.state is EngineState.STARTING
    assert (served.thread.progress.done, served.thread.progress.total) == (1, 5)
    with pytest.raises(EngineNotReadyError):
        served.submit()
    with pytest.raises(EngineNotReadyError):
        served.thread.call(lambda engine: None).result(TIMEOUT)
    start.goes_on.set()
    served.thread.ready.result(TIMEOUT)
    assert served.thread.state is EngineState.READY
    assert served.thread.progress.stage == "ready"
    assert served.tokens(served.submit()) == dense_greedy(prompt_of(5), 16)
    served.close()


def test_an_engine_that_cannot_start_says_why() -> None:
    def make(tell: Callable[[StartProgress], None]) -> Engine:
        raise Broken("no weights")

    thread = EngineThread(make)
    with pytest.raises(EngineDeadError, match="Broken: no weights") as raised:
        thread.ready.result(TIMEOUT)
    assert isinstance(raised.value.__cause__, Broken)
    thread.stopped.result(TIMEOUT)
    assert thread.state is EngineState.DEAD
    assert isinstance(thread.error, Broken)
    thread.close(TIMEOUT)
    assert thread.state is EngineState.DEAD


@pytest.mark.parametrize("ends", [EngineThread.drain, lambda thread: thread.close(0)], ids=["drain", "close"])
def test_a_start_is_cancelled_at_its_next_sign_of_life(ends: Callable[[EngineThread], object]) -> None:
    start = SlowStart()
    thread = EngineThread(start)
    assert start.begun.wait(TIMEOUT)
    ends(thread)
    start.goes_on.set()
    with pytest.raises(EngineDeadError, match="closed"):
        thread.ready.result(TIMEOUT)
    thread.stopped.result(TIMEOUT)
    assert thread.state is EngineState.CLOSED
    assert thread.error is None
    assert start.made == []


def test_an_engine_that_was_closed_while_it_was_made_is_closed_again() -> None:
    begun, goes_on, made = threading.Event(), threading.Event(), []

    def make(tell: Callable[[StartProgress], None]) -> Engine:
        begun.set()
        assert goes_on.wait(TIMEOUT)
        made.append(tiny())
        return made[0]

    thread = EngineThread(make)
    assert begun.wait(TIMEOUT)
    thread.close(0)
    goes_on.set()
    with pytest.raises(EngineDeadError, match="closed"):
        thread.ready.result(TIMEOUT)
    thread.stopped.result(TIMEOUT)
    with pytest.raises(EngineClosedError):
        made[0].stats()


def test_who_gives_up_waiting_cancels_nothing_for_others() -> None:
    start = SlowStart()
    thread = EngineThread(start)
    assert start.begun.wait(TIMEOUT)
    assert not thread.ready.cancel()
    start.goes_on.set()
    thread.ready.result(TIMEOUT)
    drained = thread.drain()
    assert not drained.cancel()
    drained.result(TIMEOUT)
    thread.close(TIMEOUT)
    assert thread.state is EngineState.CLOSED


def test_draining_ends_what_is_there_and_takes_nothing_new() -> None:
    served = Served()
    with held(served.thread):
        tickets = [served.submit(prompt=prompt_of(9, seed=i)) for i in range(12)]
        drained = served.thread.drain()
        assert served.thread.state is EngineState.DRAINING
        with pytest.raises(EngineDrainingError):
            served.submit()
        with pytest.raises(EngineDrainingError):
            served.thread.check_available()
        assert not drained.done()
    drained.result(TIMEOUT)
    for seed, ticket in enumerate(tickets):
        assert ticket.done
        assert served.tokens(ticket) == dense_greedy(prompt_of(9, seed=seed), 16)
    served.assert_idle()
    served.thread.drain().result(TIMEOUT)
    served.close()
    served.thread.drain().result(TIMEOUT)


def test_what_has_not_begun_when_all_is_aborted_is_told_of_the_shutdown() -> None:
    served = Served()
    running = served.submit(LONG)
    wait_until(lambda: served.inbox.of(running))
    with held(served.thread):
        cancelled, waiting = served.submit(), served.submit()
        served.thread.cancel(cancelled)
        drained = served.thread.drain()
        served.thread.abort_all()
    drained.result(TIMEOUT)
    assert reasons(served.inbox.last(running)) == ["abort"]
    assert reasons(served.inbox.last(cancelled)) == ["abort"]
    assert isinstance(served.inbox.last(waiting), EngineDrainingError)
    assert len(served.inbox.of(waiting)) == len(served.inbox.of(cancelled)) == 1
    served.assert_idle()
    served.close()


def test_closing_gives_everybody_a_last_item() -> None:
    served = Served()
    running = served.submit(LONG)
    wait_until(lambda: served.inbox.of(running))
    results: list[Future[Any]] = []
    with held(served.thread):
        waiting = [served.submit(LONG) for _ in range(3)]
        results = [served.thread.call(lambda engine: engine.stats()), served.thread.drain()]
        served.thread.close(0)
        assert served.thread.state is EngineState.CLOSED
        with pytest.raises(EngineDeadError):
            served.submit()
    served.thread.close(TIMEOUT)
    for ticket in (running, *waiting):
        assert isinstance(served.inbox.last(ticket), EngineDeadError)
    assert served.thread.num_unfinished == 0
    assert isinstance(results[0].exception(TIMEOUT), EngineDeadError)
    results[1].result(TIMEOUT)
    assert served.thread.error is None
    with pytest.raises(EngineDeadError):
        served.thread.call(lambda engine: None).result(TIMEOUT)
    served.close()


def test_a_step_that_fails_ends_its_requests_and_no_others() -> None:
    served = Served()
    served.run(lambda engine: break_steps(engine, poisoned))
    good = served.submit(prompt=prompt_of(40))
    assert served.tokens(good) == dense_greedy(prompt_of(40), 16)
    for number in range(20):
        with held(served.thread):  # a prompt takes the whole budget of a step, so each is alone at first
            struck = served.submit(name=f"poison-{number}", prompt=prompt_of(40, seed=1 + number))
            spared = served.submit(prompt=prompt_of(40))
        assert isinstance(served.inbox.last(struck).error, Broken)
        assert reasons(served.inbox.last(struck)) == ["error"]
        assert served.tokens(spared) == dense_greedy(prompt_of(40), 16)
        served.assert_idle()
    served.close()


def test_a_poisonous_request_alone_does_no_harm() -> None:
    served = Served()
    served.run(lambda engine: break_steps(engine, poisoned))
    for number in range(20):
        assert isinstance(served.inbox.last(served.submit(name=f"poison-{number}")).error, Broken)
        served.assert_idle()
    assert served.thread.state is EngineState.READY
    assert served.tokens(served.submit()) == dense_greedy(prompt_of(5), 16)
    served.close()


@pytest.mark.parametrize("times", range(1, 6))
def test_steps_that_fail_a_few_times(times: int) -> None:
    served, left = Served(), iter([True] * times)
    served.run(lambda engine: break_steps(engine, lambda step: next(left, False)))
    tickets = [served.submit(LONG.clone(max_tokens=30), prompt=prompt_of(9, seed=i)) for i in range(30)]
    struck = 0
    for seed, ticket in enumerate(tickets):
        if served.inbox.last(ticket).error is None:
            assert served.tokens(ticket) == dense_greedy(prompt_of(9, seed=seed), 30)
        else:
            assert isinstance(served.inbox.last(ticket).error, Broken)
            struck += 1
    assert struck > 0
    served.assert_idle()
    assert served.thread.state is EngineState.READY
    served.close()


def test_an_engine_whose_every_step_fails_is_dead_for_everybody() -> None:
    served = Served()
    served.run(lambda engine: break_steps(engine, lambda step: True))
    tickets = []
    with contextlib.suppress(EngineDeadError):
        while len(tickets) < 100:
            tickets.append(served.submit())
            served.inbox.last(tickets[-1])
    served.thread.stopped.result(TIMEOUT)
    assert served.thread.state is EngineState.DEAD
    assert isinstance(served.thread.error, Broken)
    assert 3 <= len(tickets) < 100
    with pytest.raises(EngineDeadError, match="no step today") as raised:
        served.submit()
    assert isinstance(raised.value.__cause__, Broken)
    with pytest.raises(EngineDeadError):
        served.thread.call(lambda engine: None).result(TIMEOUT)
    served.thread.drain().result(TIMEOUT)
    served.close()


class Raises(Fcfs):
    """A policy with a mistake in it."""

    window = 2

    def __init__(self, times: float) -> None:
        self.times = times

    def choose(self, candidates: Sequence[Request], num_cached_tokens: Callable[[Request], int]) -> int:
        if self.times > 0:
            self.times -= 1
            raise Broken("no choice today")
        return 0


@pytest.mark.parametrize("times", [1, 2])
def test_a_policy_that_raises_now_and_then_is_asked_again(times: int) -> None:
    served = Served(tiny(scheduling_policy=Raises(times)))
    with held(served.thread):
        tickets = [served.submit(prompt=prompt_of(9, seed=i)) for i in range(4)]
    for seed, ticket in enumerate(tickets):
        assert served.tokens(ticket) == dense_greedy(prompt_of(9, seed=seed), 16)
    served.assert_idle()
    served.close()


def test_a_policy_that_always_raises_is_the_end() -> None:
    served = Served(tiny(scheduling_policy=Raises(float("inf"))))
    with held(served.thread):
        tickets = [served.submit() for _ in range(4)]
    for ticket in tickets:
        with pytest.raises(EngineDeadError, match="no choice today") as raised:
            raise served.inbox.last(ticket)
        assert isinstance(raised.value.__cause__, Broken)
    served.thread.stopped.result(TIMEOUT)
    assert served.thread.state is EngineState.DEAD
    assert served.thread.num_unfinished == 0
    served.close()


def test_what_a_function_raises_goes_to_its_caller() -> None:
    served = Served()
    ticket = served.submit()
    for error in (Broken("no"), SystemExit(3), KeyboardInterrupt()):

        def fail(engine: Engine, error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)):
            served.run(fail)
    assert served.tokens(ticket) == dense_greedy(prompt_of(5), 16)
    with held(served.thread):
        future = served.thread.call(lambda engine: 1 / 0)
        assert future.cancel()
    assert served.run(lambda engine: engine.config.block_size) == 4
    served.assert_idle()
    served.close()


def test_a_mailbox_that_takes_nothing_ends_its_own_requests() -> None:
    served = Served()
    spared, struck = served.submit(), [served.ticket(LONG) for _ in range(3)]

    class Closed:
        def post(self, items: object) -> None:
            raise RuntimeError("the event loop is closed")

    for ticket in struck:
        ticket.mailbox = Closed()
    served.thread.submit(*struck)
    assert served.tokens(spared) == dense_greedy(prompt_of(5), 16)
    wait_until(lambda: all(ticket.done for ticket in struck))
    served.assert_idle()
    served.close()


LEAVES_IN_THE_MIDDLE = """
import threading

from jaxpaged.serve.engine_thread import EngineThread
from jaxpaged.serve.tickets import Ticket
from tests.engine.tiny import GREEDY, new_engine, prompt_of

thread, arrived = EngineThread(new_engine()), threading.Event()


class Inbox:
    def post(self, items):
        arrived.set()


thread.ready.result()
params = GREEDY.clone(max_tokens=100, output_kind=1)
thread.submit(*(Ticket(str(i), prompt_of(5, seed=i), params, {}, Inbox()) for i in range(8)))
assert arrived.wait(100)
print("leaves with", thread.num_unfinished)
"""


def test_a_process_may_end_without_closing_its_engine() -> None:
    """What is with the device then must not take it down."""
    command = [sys.executable, "-c", LEAVES_IN_THE_MIDDLE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "leaves with 8\n"

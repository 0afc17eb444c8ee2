"""Tiny engines for those that serve them: shared programs, failures on demand, a hand on their thread."""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from jaxpaged import Engine, EngineStats, RequestOutput, RequestOutputKind
from jaxpaged.serve.engine_thread import EngineThread
from jaxpaged.serve.tickets import Item, Ticket
from jaxpaged.step_plan import ScheduledStep
from tests.engine.family import core_of
from tests.engine.tiny import GREEDY, new_engine, prompt_of
from tests.serve.asynchronous import TIMEOUT, wait_until

DELTA = GREEDY.clone(output_kind=RequestOutputKind.DELTA)
LONG = DELTA.clone(max_tokens=110)


class Broken(RuntimeError):
    """What the tests raise."""


@cache
def _programs() -> tuple[dict[Any, Any], dict[str, Any]]:
    return {}, {}


def tiny(**switches: Any) -> Engine:
    """An engine of ``tiny.SIZES`` that belongs to whoever serves it, over the programs of those that were closed."""
    engine, (programs, small) = new_engine(**switches), _programs()
    runner = core_of(engine).runner
    runner._programs.update(programs)
    runner._small.update(small)
    close = runner.close

    def hand_down() -> None:
        programs.update(runner._programs)
        small.update(runner._small)
        close()

    runner.close = hand_down  # type: ignore[method-assign]
    return engine


def break_steps(engine: Engine, fails: Callable[[ScheduledStep], bool]) -> None:
    """Steps that ``fails`` says so of raise when they are built; to be called in the engine's thread, or before it."""
    builder = core_of(engine).builder
    build = builder.build

    def build_or_fail(step: ScheduledStep) -> Any:
        if fails(step):
            raise Broken("no step today")
        return build(step)

    builder.build = build_or_fail  # type: ignore[method-assign]


def names_in(step: ScheduledStep) -> set[str]:
    """The requests of a step."""
    return {request.request_id for request, _ in step.rows}


def poisoned(step: ScheduledStep) -> bool:
    """Whether a request is among them whose name says that it fails."""
    return any("poison" in name for name in names_in(step))


def assert_clean(stats: EngineStats) -> None:
    """Nobody holds anything."""
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_requests_running == stats.num_requests_waiting == 0
    assert stats.block_holders == {}


def check(engine: Engine) -> EngineStats:
    """To be run in the engine's thread: its invariants, and what it says of itself."""
    engine.check_invariants()
    return engine.stats()


class Inbox:
    """A mailbox for tests that do without an event loop."""

    def __init__(self) -> None:
        self.items: list[Item] = []

    def post(self, items: list[Item]) -> None:
        self.items += items

    def of(self, ticket: Ticket) -> list[Any]:
        return [item for each, item in list(self.items) if each is ticket]

    def last(self, ticket: Ticket) -> Any:
        """Waits for its last item."""
        wait_until(lambda: any(_is_last(item) for item in self.of(ticket)))
        return self.of(ticket)[-1]


def _is_last(item: Any) -> bool:
    return isinstance(item, Exception) or item.finished


@contextlib.contextmanager
def held(thread: EngineThread) -> Iterator[None]:
    """The engine's thread stands between two steps; commands pile up and run together afterwards."""
    stands, goes_on = threading.Event(), threading.Event()

    def stand(engine: Engine) -> None:
        stands.set()
        assert goes_on.wait(TIMEOUT), "nobody let go"

    future = thread.call(stand)
    assert stands.wait(TIMEOUT), "the engine does not listen"
    try:
        yield
    finally:
        goes_on.set()
    future.result(TIMEOUT)


class Served:
    """An engine's thread, and a mailbox that everything goes to."""

    def __init__(self, engine: Engine | EngineThread | None = None, **arguments: Any) -> None:
        self.inbox = Inbox()
        self._names = itertools.count()
        if isinstance(engine, EngineThread):
            self.thread = engine
        else:
            self.thread = EngineThread(tiny() if engine is None else engine, **arguments)
            self.thread.ready.result(TIMEOUT)

    def ticket(self, params: Any = DELTA, *, name: str | None = None, prompt: Any = None) -> Ticket:
        name = f"request-{next(self._names)}" if name is None else name
        return Ticket(name, prompt_of(5) if prompt is None else prompt, params, {}, self.inbox)

    def submit(self, params: Any = DELTA, **named: Any) -> Ticket:
        ticket = self.ticket(params, **named)
        self.thread.submit(ticket)
        return ticket

    def run(self, function: Callable[[Engine], Any]) -> Any:
        return self.thread.call(function).result(TIMEOUT)

    def tokens(self, ticket: Ticket) -> list[int]:
        """Waits for the end of a DELTA request that is not to fail; its tokens."""
        last = self.inbox.last(ticket)
        assert isinstance(last, RequestOutput), last
        assert last.error is None
        return [token for item in self.inbox.of(ticket) for token in item.outputs[0].token_ids]

    def assert_idle(self) -> None:
        wait_until(lambda: not self.thread.num_unfinished)
        assert_clean(self.run(check))
        assert self.thread._tickets == {}

    def close(self) -> None:
        self.thread.close(TIMEOUT)
        assert not self.thread.is_alive


def reasons(output: RequestOutput) -> list[str | None]:
    """Why each completion has ended."""
    return [completion.finish_reason for completion in output.outputs]

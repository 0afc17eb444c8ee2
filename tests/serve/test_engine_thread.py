"""The thread that owns an engine: whatever happens, everybody gets a last item and nothing is held for nobody."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from jaxpaged import BeamSearchParams, Engine, IterationRecord, RequestOutputKind, RequestRecord
from jaxpaged.detokenizer import IncrementalDetokenizer
from jaxpaged.errors import InvalidRequestError, UnknownRequestError
from jaxpaged.serve.engine_state import EngineState
from jaxpaged.serve.engine_thread import EngineThread, QueueFullError
from tests.engine.tiny import dense_greedy, prompt_of
from tests.serve.asynchronous import TIMEOUT, wait_until
from tests.serve.served_engines import DELTA, LONG, Broken, Served, held, reasons, tiny


@pytest.fixture
def served() -> Iterator[Served]:
    found = Served()
    yield found
    if found.thread.state is EngineState.READY:
        found.assert_idle()
    found.close()


def test_requests_go_in_and_outputs_come_out(served: Served) -> None:
    prompts = [prompt_of(3 + i, seed=i) for i in range(12)]
    tickets = [served.submit(prompt=prompt) for prompt in prompts]
    for ticket, prompt in zip(tickets, prompts, strict=True):
        assert served.tokens(ticket) == dense_greedy(prompt, 16)
        assert ticket.done


@pytest.mark.parametrize(
    "params", [DELTA.clone(n=3, temperature=1.0), BeamSearchParams(beam_width=3, max_tokens=9)]
)
def test_who_is_cancelled_before_the_engine_has_it_gets_a_last_output(served: Served, params: Any) -> None:
    with held(served.thread):
        ticket = served.submit(params, prompt="def main")
        served.thread.cancel(ticket)
        other = served.submit()
    last = served.inbox.last(ticket)
    assert last.finished
    assert reasons(last) == ["abort"] * 3
    assert last.prompt == "def main"
    assert served.tokens(other) == dense_greedy(prompt_of(5), 16)


def test_ending_a_request_again_and_again_ends_only_it(served: Served) -> None:
    """All between two steps, when the engine does not know the request any more and its last output is on the way."""
    ticket, other = served.submit(LONG), served.submit()
    wait_until(lambda: served.inbox.of(ticket))
    with held(served.thread):
        served.thread.cancel(ticket)
        served.thread.cancel(ticket)
        unknown = served.thread.abort(ticket.request_id)
        served.thread.cancel(ticket)
    with pytest.raises(UnknownRequestError):
        unknown.result(TIMEOUT)
    assert reasons(served.inbox.last(ticket)) == ["abort"]
    assert served.tokens(other) == dense_greedy(prompt_of(5), 16)
    with held(served.thread):
        ticket = served.submit(LONG)
    wait_until(lambda: served.inbox.of(ticket))
    with held(served.thread):
        served.thread.cancel(ticket)
        served.thread.abort_all()
        served.thread.abort_all()
    assert reasons(served.inbox.last(ticket)) == ["abort"]
    assert served.thread.state is EngineState.READY


def test_an_id_can_be_used_again_at_once(served: Served) -> None:
    tickets = []
    for number in range(6):
        ticket = served.submit(LONG, name="same", prompt=prompt_of(7, seed=number))
        wait_until(lambda ticket=ticket: served.inbox.of(ticket))  # type: ignore[misc]
        with held(served.thread):
            served.thread.cancel(ticket)
            tickets.append(served.submit(name="same", prompt=prompt_of(7, seed=number)))
        assert reasons(served.inbox.last(ticket)) == ["abort"]
        assert served.tokens(tickets[-1]) == dense_greedy(prompt_of(7, seed=number), 16)
    assert len(tickets) == 6


def test_an_id_that_is_in_use_is_refused_and_its_owner_goes_on(served: Served) -> None:
    with held(served.thread):
        first, second = served.submit(name="same"), served.submit(name="same")
    error = served.inbox.last(second)
    assert isinstance(error, InvalidRequestError)
    assert error.argument == "request_id"
    assert served.tokens(first) == dense_greedy(prompt_of(5), 16)


def test_a_request_is_known_by_its_id_from_the_moment_it_was_submitted(served: Served) -> None:
    with held(served.thread):
        ticket = served.submit(name="mine")
        aborted = served.thread.abort("mine")
        again = served.thread.abort("mine")
    aborted.result(TIMEOUT)
    with pytest.raises(UnknownRequestError):
        again.result(TIMEOUT)
    assert reasons(served.inbox.last(ticket)) == ["abort"]
    with pytest.raises(UnknownRequestError, match="mine"):
        served.thread.abort("mine").result(TIMEOUT)


def test_what_is_wrong_with_a_request_goes_to_who_sent_it(served: Served) -> None:
    wrong = [
        served.submit(prompt=[10**6]),
        served.submit("no parameters"),
        served.submit(prompt=prompt_of(127) * 2),
    ]
    for ticket in wrong:
        assert isinstance(served.inbox.last(ticket), InvalidRequestError)


def test_outputs_that_somebodys_function_takes_are_missed_by_nobody_for_ever(served: Served) -> None:
    def step_to_the_end(engine: Engine) -> None:
        while engine.has_unfinished_requests:
            engine.step()

    ticket = served.submit(LONG)
    wait_until(lambda: served.inbox.of(ticket))
    served.run(step_to_the_end)
    with pytest.raises(RuntimeError, match="lost"):
        raise served.inbox.last(ticket)
    drained = served.thread.drain()
    drained.result(TIMEOUT)


def test_a_request_that_cannot_be_ended_fails_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket, other = served.submit(LONG), served.submit()
    wait_until(lambda: served.inbox.of(ticket))
    abort = served.run(lambda engine: engine.abort_request)

    def fail(request_id: str) -> None:
        abort(request_id)
        raise Broken("no end")

    with held(served.thread):
        monkeypatch.setattr(served.thread.engine, "abort_request", fail)
        served.thread.cancel(ticket)
    assert isinstance(served.inbox.last(ticket), Broken)
    assert served.tokens(other) == dense_greedy(prompt_of(5), 16)


def test_text_that_fails_ends_one_request(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    append, cursed = IncrementalDetokenizer.append, dense_greedy(prompt_of(6, seed=0), 16)[3]

    def fail_at_one_token(self: IncrementalDetokenizer, token_id: int) -> str:
        if token_id == cursed:
            raise Broken("no text")
        return append(self, token_id)

    monkeypatch.setattr(IncrementalDetokenizer, "append", fail_at_one_token)
    struck, spared = served.submit(prompt=prompt_of(6, seed=0)), served.submit(prompt=prompt_of(6, seed=1))
    assert isinstance(served.inbox.last(struck).error, Broken)
    assert served.tokens(spared) == dense_greedy(prompt_of(6, seed=1), 16)


# The queue.


def test_the_queue_is_measured_in_sequences() -> None:
    served = Served(max_queue_length=2)  # and 8 that run
    with held(served.thread):
        five, three = (served.submit(LONG.clone(n=n, temperature=1.0, max_tokens=4)) for n in (5, 3))
        beams = served.submit(BeamSearchParams(beam_width=2, max_tokens=4))
        assert served.thread.num_unfinished == 10
        with pytest.raises(QueueFullError, match="10 sequences") as refused:
            served.submit()
        assert refused.value.retry_after == 1.0
        with pytest.raises(QueueFullError):
            served.thread.check_available()
    for ticket in (five, three, beams):
        assert served.inbox.last(ticket).finished
    served.assert_idle()
    with held(served.thread):
        served.submit()
        with pytest.raises(QueueFullError):
            served.submit(DELTA.clone(n=10, temperature=1.0))
        served.thread.check_available(9)
    served.assert_idle()
    wide = served.submit(DELTA.clone(n=11, temperature=1.0, max_tokens=2))
    assert served.inbox.last(wide).finished, "one that is alone is the engine's to judge"
    served.close()


def test_several_are_taken_together_or_not_at_all() -> None:
    served = Served(max_queue_length=0)
    with pytest.raises(QueueFullError):
        served.thread.submit(*(served.ticket() for _ in range(9)))
    served.assert_idle()
    tickets = [served.ticket() for _ in range(8)]
    served.thread.submit(*tickets)
    for ticket in tickets:
        assert served.tokens(ticket) == dense_greedy(prompt_of(5), 16)
    served.assert_idle()
    served.close()


def test_who_comes_too_early_is_told_how_fast_requests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    served, now = Served(max_queue_length=0), 1000.0
    with held(served.thread):
        monkeypatch.setattr("jaxpaged.serve.engine_thread.time.monotonic", lambda: now)
        tickets = [served.ticket(LONG) for _ in range(8)]
        served.thread.submit(*tickets)
        for ticket in tickets[:3]:
            served.thread._finish(ticket)
            now += 5.0
        served.thread.submit(*(served.ticket(LONG) for _ in range(3)))
        with pytest.raises(QueueFullError) as refused:
            served.submit()
        assert refused.value.retry_after == 7.5
        now += 10_000.0
        with pytest.raises(QueueFullError) as refused:
            served.submit()
        assert refused.value.retry_after == 60.0
        monkeypatch.undo()
        served.thread.num_unfinished += 3
        for ticket in tickets[:3]:
            ticket.done = False
        served.thread.abort_all()
    served.assert_idle()
    assert served.thread._retry_after() == 1.0, "a pause says nothing"
    served.close()


@pytest.mark.parametrize("limit", [-1, 1.5, True, None])
def test_a_wrong_limit_is_refused(limit: Any) -> None:
    with pytest.raises(InvalidRequestError, match="max_queue_length"):
        EngineThread(lambda tell: tiny(), max_queue_length=limit)


# Who listens.


class Notes:
    """Keeps everything it is told."""

    def __init__(self) -> None:
        self.steps: list[IterationRecord] = []
        self.ends: list[RequestRecord] = []
        self.gap_counts: dict[float, int] = {}

    def stepped(self, record: IterationRecord) -> None:
        self.steps.append(record)

    def ended(self, record: RequestRecord) -> None:
        self.ends.append(record)

    def gaps(self, gaps: Mapping[float, int]) -> None:
        for gap, count in gaps.items():
            self.gap_counts[gap] = self.gap_counts.get(gap, 0) + count


KINDS = {
    "streamed": LONG.clone(max_tokens=20),
    "at the end": LONG.clone(max_tokens=20, output_kind=RequestOutputKind.FINAL_ONLY),
    "everything each time": LONG.clone(max_tokens=20, output_kind=RequestOutputKind.CUMULATIVE),
    "three streamed": LONG.clone(max_tokens=20, n=3, temperature=1.0, seed=1),
    "the best": LONG.clone(max_tokens=20, n=1, best_of=3, temperature=1.0, seed=1),
    "one token": LONG.clone(max_tokens=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_are_those_between_the_tokens_of_a_completion(served: Served, kind: str) -> None:
    notes, params = Notes(), KINDS[kind]
    served.thread.listeners.add(notes)
    served.inbox.last(served.submit(params))
    wait_until(lambda: len(notes.ends) == params.num_completions)
    served.run(lambda engine: None)
    assert all(record.num_generation_tokens == params.max_tokens for record in notes.ends)
    assert sum(notes.gap_counts.values()) == (params.max_tokens - 1) * params.num_completions
    wanted = sum((r.time_per_output_token or 0.0) * (r.num_generation_tokens - 1) for r in notes.ends)
    seconds = sum(gap * count for gap, count in notes.gap_counts.items())
    if kind == "three streamed":
        # Records count from the first token of the request, and two completions have begun a little later.
        assert 0.0 < seconds <= wanted
    else:
        assert seconds == pytest.approx(wanted)
    if kind.endswith("streamed"):
        assert len(notes.gap_counts) > 1, "each gap for itself"
    assert len({record.step for record in notes.steps}) == len(notes.steps) > 0


def test_completions_that_begin_late_have_no_gap_before_their_first_token(served: Served) -> None:
    """Twelve of one request where eight fit: the last four begin when others have ended."""
    notes, params = Notes(), LONG.clone(n=12, temperature=1.0, seed=3, max_tokens=6)
    served.thread.listeners.add(notes)
    served.inbox.last(served.submit(params))
    wait_until(lambda: len(notes.ends) == 12)
    served.run(lambda engine: None)
    assert sum(notes.gap_counts.values()) == 12 * 5


def test_a_listener_that_raises_is_told_no_more(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    class Raises(Notes):
        def stepped(self, record: IterationRecord) -> None:
            super().stepped(record)
            raise Broken("I do not want to know")

    before, notes, after = Notes(), Raises(), Notes()
    for listener in (before, notes, after):
        served.thread.listeners.add(listener)
    assert served.tokens(served.submit()) == dense_greedy(prompt_of(5), 16)
    wait_until(lambda: before.ends and after.ends)
    assert len(notes.steps) == 1
    assert len(before.steps) == len(after.steps) > 1
    assert notes.ends == []
    assert caplog.text.count("is told no more") == 1

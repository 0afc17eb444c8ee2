"""Keeps what came back until the run is over, and reads it then."""

from collections.abc import Sequence

from jaxpaged.serve.bench_serve.answer import read_answer
from jaxpaged.serve.bench_serve.figures import Outcome
from jaxpaged.serve.bench_serve.load import Attempt

MAX_HELD_BYTES = 256 * 2**20


class Collector:
    """Takes the requests of a run as they end.

    Decoding the JSON of an answer while other requests run would delay the clock for theirs, so it waits for the end;
    but for answers beyond ``max_held_bytes`` in all, which are read when they end.
    """

    def __init__(self, prompt_lens: Sequence[int | None], max_held_bytes: int = MAX_HELD_BYTES) -> None:
        self.num_ended = 0
        self.num_failed = 0  # as far as that can be told without reading the answers
        self.num_chunks = 0
        self.num_read_early = 0
        self._prompt_lens = prompt_lens
        self._room = max_held_bytes
        self._unread: list[Attempt] = []
        self._outcomes: list[Outcome] = []

    def take(self, attempt: Attempt) -> None:
        """Keeps a request that has ended."""
        self.num_ended += 1
        self.num_failed += attempt.failure is not None or attempt.exchange.status != 200
        self.num_chunks += len(attempt.exchange.times)
        if self._room > 0:
            self._room -= sum(map(len, attempt.exchange.pieces))
            self._unread.append(attempt)
        else:
            self.num_read_early += 1
            self._outcomes.append(outcome(attempt, self._prompt_lens[attempt.at]))

    def outcomes(self) -> list[Outcome]:
        """All that has ended, in the order of the workload."""
        while self._unread:
            attempt = self._unread.pop()
            self._outcomes.append(outcome(attempt, self._prompt_lens[attempt.at]))
        self._outcomes.sort(key=lambda one: one.at)
        return self._outcomes


def outcome(attempt: Attempt, prompt_len: int | None) -> Outcome:
    """Reads what came back. ``prompt_len`` is the number of prompt tokens, where the client knows it."""
    at, exchange = attempt.at, attempt.exchange
    if attempt.failure is not None:
        return Outcome(at, attempt.scheduled, exchange.sent, exchange.ended, failure=attempt.failure)
    answer = read_answer(exchange)
    counted = answer.completion_tokens
    return Outcome(
        at=at,
        scheduled=attempt.scheduled,
        sent=exchange.sent,
        ended=exchange.ended if answer.ended is None else answer.ended,
        token_times=answer.token_times,
        output_len=len(answer.token_times) if counted is None else counted,
        prompt_len=prompt_len if answer.prompt_tokens is None else answer.prompt_tokens,
        is_counted_by_server=counted is not None,
        text=answer.text,
        finish_reason=answer.finish_reason,
        failure=answer.failure,
    )

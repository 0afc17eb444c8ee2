"""Who is told what an engine does, as it happens: records of steps and completions, and gaps between tokens."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxpaged import RequestOutput
from jaxpaged.records import IterationRecord, RecordListener, RequestRecord
from jaxpaged.serve.tickets import Ticket

logger = logging.getLogger(__name__)


class Listener(RecordListener, Protocol):
    """Is told what happens, in the engine's thread: returns within microseconds, never blocks, never raises."""

    def gaps(self, gaps: Mapping[float, int]) -> None:
        """Times between successive tokens of a completion, in seconds, and how many tokens came after each."""


class Listeners:
    """Tells everybody who wants to know; itself a listener to the engine's records.

    Args:
      find: the ticket of a request that the engine has, by its id.
    """

    def __init__(self, find: Callable[[str], Ticket | None]) -> None:
        self._find = find
        self._listeners: list[Listener] = []

    def add(self, listener: Listener) -> None:
        """Tells ``listener`` everything from now on, until it raises; from any thread."""
        self._listeners.append(listener)

    def stepped(self, record: IterationRecord) -> None:
        """A turn of the engine's loop has ended."""
        self._tell("stepped", record)

    def ended(self, record: RequestRecord) -> None:
        """A completion has ended."""
        ticket, gap = self._find(record.request_id), record.time_per_output_token
        if gap is not None and (ticket is None or not ticket.shows_every_token):
            # When its tokens came is not known, only how long they took in the mean.
            self._tell("gaps", {gap: record.num_generation_tokens - 1})
        self._tell("ended", record)

    def gaps(self, gaps: Mapping[float, int]) -> None:
        """A step has brought tokens that were not the first of their completions."""
        if gaps:
            self._tell("gaps", gaps)

    def _tell(self, event: str, value: Any) -> None:
        for listener in list(self._listeners):
            try:
                getattr(listener, event)(value)
            except Exception:
                logger.exception("%r is told no more: it raised", listener)
                self._listeners.remove(listener)


def note_gaps(ticket: Ticket, output: RequestOutput, gaps: dict[float, int]) -> None:
    """Adds the times between the tokens that an output brings and those that came before in their completions."""
    metrics, times = output.metrics, ticket.last_token_times
    now = None if metrics is None else metrics.last_token_time
    if now is None or not ticket.shows_every_token:
        return
    for completion in output.outputs:
        count = len(completion.token_ids)
        if not count:
            continue
        before = times.get(completion.index)
        times[completion.index] = now
        if before is not None:
            gap = (now - before) / count  # several steps may bring theirs at once
            gaps[gap] = gaps.get(gap, 0) + count

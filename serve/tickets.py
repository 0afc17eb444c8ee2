"""Requests on their way through the thread of an engine, and who hears of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxpaged import BeamSearchParams, CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams
from jaxpaged.records import RecordListener


class Listener(RecordListener, Protocol):
    """Is told what happens, in the engine's thread: returns within microseconds, never blocks, never raises."""

    def gaps(self, gaps: Mapping[float, int]) -> None:
        """Times between successive tokens of a completion, in seconds, and how many tokens came after each."""


class Mailbox(Protocol):
    """Takes outputs of requests."""

    def post(self, items: "list[Item]") -> None:
        """What a step brought; called in the engine's thread, so it only passes it on.

        An exception is the last that a ticket gets, as is an output that has finished.
        """


@dataclass(eq=False, slots=True)
class Ticket:
    """A request on its way through the engine's thread."""

    request_id: str
    prompt: Any  # as ``Engine.add_request`` takes it
    params: Any  # SamplingParams or BeamSearchParams
    handling: dict[str, Any]  # further arguments of ``Engine.add_request``
    mailbox: Mailbox
    cancelled: bool = False
    done: bool = False  # nothing more comes
    last_token_time: float | None = None

    @property
    def weight(self) -> int:
        """Sequences it asks for."""
        return int(getattr(self.params, "num_completions", 0) or getattr(self.params, "beam_width", 1))

    @property
    def shows_every_token(self) -> bool:
        """Whether its outputs tell when each token came."""
        return getattr(self.params, "output_kind", None) is RequestOutputKind.DELTA


Item = tuple[Ticket, RequestOutput | Exception]


def aborted_output(ticket: Ticket) -> RequestOutput:
    """The last output of a request that ended before the engine had it, and so before anybody looked at its prompt."""
    prompt, params, count = ticket.prompt, ticket.params, 1
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    if isinstance(params, SamplingParams):
        count = params.n
    elif isinstance(params, BeamSearchParams):
        count = params.num_return_sequences or 1
    outputs = [CompletionOutput(index, "", [], finish_reason="abort") for index in range(count)]
    return RequestOutput(ticket.request_id, text if isinstance(text, str) else None, [], outputs, finished=True)


def note_gaps(ticket: Ticket, output: RequestOutput, gaps: dict[float, int]) -> None:
    """Adds the times between the tokens that an output brings and the ones before."""
    metrics = output.metrics
    now, before = None if metrics is None else metrics.last_token_time, ticket.last_token_time
    if now is None or now == before:
        return
    ticket.last_token_time = now
    if before is None:
        return
    for completion in output.outputs:
        count = len(completion.token_ids)
        if count:
            gap = (now - before) / count  # a program of several steps brings several at once
            gaps[gap] = gaps.get(gap, 0) + count

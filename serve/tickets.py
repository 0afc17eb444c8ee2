"""Requests on their way through the thread of an engine, and where their outputs go."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxpaged import BeamSearchParams, CompletionOutput, RequestOutput, RequestOutputKind, SamplingParams


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
    last_token_times: dict[int, float] = field(default_factory=dict)  # by completion
    reader: Any = None  # for the mailbox: who reads the outputs

    @property
    def weight(self) -> int:
        """Sequences it asks for."""
        return int(getattr(self.params, "num_completions", 0) or getattr(self.params, "beam_width", 1))

    @property
    def shows_every_token(self) -> bool:
        """Whether its outputs tell when each token came; ``best_of`` shows nothing before the end."""
        params = self.params
        if not isinstance(params, SamplingParams) or params.output_kind is not RequestOutputKind.DELTA:
            return False
        return params.num_completions == params.n


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
    return RequestOutput(
        ticket.request_id, text if isinstance(text, str) else None, [], outputs, finished=True
    )

"""Where outputs go: to the call that waits for their request, or to the next ``Engine.step``."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from jaxpaged.core import EngineCore
from jaxpaged.generation import Generation
from jaxpaged.outputs import RequestOutput


class Delivery:
    """Outputs between the step that made them and whoever takes them.

    Each is put where it is waited for, so that nobody loses one by somebody else's step. Invariant: only live requests
    have an inbox.
    """

    def __init__(self) -> None:
        self.pending: list[RequestOutput] = []  # for the next step()
        self._inboxes: dict[str, list[RequestOutput]] = {}  # those that generate() or stream() waits for

    def deliver(self, outputs: Iterable[RequestOutput]) -> None:
        """Puts each output into the inbox of its request, or else to those that are pending."""
        for output in outputs:
            find = self._inboxes.pop if output.finished else self._inboxes.get
            inbox = find(output.request_id, None)
            (self.pending if inbox is None else inbox).append(output)

    def take(self) -> list[RequestOutput]:
        """What is pending, which is then nobody's any more."""
        pending, self.pending = self.pending, []
        return pending

    def clear(self) -> None:
        """Forgets everything; all requests have ended."""
        self.pending.clear()
        self._inboxes.clear()

    def complete(
        self,
        core: EngineCore,
        generations: Sequence[Generation],
        admit: Callable[[Generation], None],
        title: str,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        """Runs requests that give one output each, and returns these in their order."""
        done: dict[str, RequestOutput] = {}
        inbox: list[RequestOutput] = []
        bar = tqdm(total=len(generations), desc=title, unit="request", disable=not use_tqdm)
        try:
            for generation in generations:
                admit(generation)
                self._inboxes[generation.request_id] = inbox
            while len(done) < len(generations):
                self.deliver(core.step())
                for output in inbox:
                    if output.error is not None:
                        raise output.error
                    done[output.request_id] = output
                    bar.update()
                inbox.clear()
        finally:
            bar.close()
            for generation in generations:
                self._drop(core, generation)
        return [done[generation.request_id] for generation in generations]

    def stream(
        self, live: Callable[[], EngineCore], generation: Generation, admit: Callable[[Generation], None]
    ) -> Iterator[Any]:
        """None once the request is admitted, then its outputs; ``live`` raises once the engine is closed."""
        core, name, inbox = live(), generation.request_id, []  # type: EngineCore, str, list[RequestOutput]
        admit(generation)
        self._inboxes[name] = inbox
        try:
            yield None
            while inbox or live().generations.get(name) is generation:
                if not inbox:
                    self.deliver(live().step())
                while inbox:
                    output = inbox.pop(0)
                    if output.error is not None:
                        raise output.error
                    yield output
        finally:
            self._drop(core, generation)

    def _drop(self, core: EngineCore, generation: Generation) -> None:
        """Nobody waits for a request any more: ends it if it still runs."""
        if core.generations.get(generation.request_id) is generation:
            self._inboxes.pop(generation.request_id, None)
            core.abort(generation.request_id)

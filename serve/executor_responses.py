"""Responses of requests until somebody takes them, and the threads that wait for them."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jaxpaged import RequestOutput
from jaxpaged.errors import UnknownRequestError
from jaxpaged.serve.engine_errors import EngineUnavailableError
from jaxpaged.serve.output_merge import merge
from jaxpaged.serve.tickets import Item, Ticket

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Response:
    """What has come of a request since its last response.

    Attributes:
      request_id: the id that ``Executor.enqueue_request`` returned.
      output: what is new, as the request's ``output_kind`` says; None where nothing came before an error.
      error: what ended the request; None unless it has failed.
      is_final: whether it is the request's last response.
    """

    request_id: int
    output: RequestOutput | None = None
    error: Exception | None = None
    is_final: bool = False


@dataclass(eq=False, slots=True)
class _Unread:
    """What a request has brought that nobody has taken."""

    request_id: int
    ticket: Ticket
    changed: threading.Condition
    output: RequestOutput | None = None
    error: Exception | None = None
    is_final: bool = False
    num_waiting: int = 0  # threads
    is_gone: bool = False  # its last response was taken or dropped

    @property
    def is_ready(self) -> bool:
        return self.output is not None or self.is_final

    def take_in(self, item: RequestOutput | Exception) -> None:
        """Another item of the request; the error of one that failed stands beside what is unread."""
        if isinstance(item, Exception):
            self.error, self.is_final = item, True
            return
        is_more = self.output is not None and self.ticket.shows_every_token
        self.output = merge(self.output, item) if self.output is not None and is_more else item
        self.error, self.is_final = item.error, item.finished


class Responses:
    """A mailbox that many threads wait at.

    Invariants (``check_invariants``): every request that was expected is here until its last response is taken or
    dropped; each holds one response at most: what comes before that is taken is merged into it. Of those that have
    ended and that nobody waits for, no more than ``max_unread`` are kept, the latest.
    """

    def __init__(self, max_unread: int) -> None:
        self.max_unread = max_unread
        self.num_dropped = 0
        self._lock = threading.Lock()
        self._any_changed = threading.Condition(self._lock)
        self._requests: dict[int, _Unread] = {}
        self._ready: dict[int, _Unread] = {}  # those with something to take, who has waited longest first
        self._ended: dict[int, _Unread] = {}  # those with their last response, the oldest first
        self._refusal: EngineUnavailableError | None = None

    def expect(self, tickets: Sequence[Ticket]) -> None:
        """Outputs of these will come; their ``request_id`` is the number of the request."""
        with self._lock:
            for ticket in tickets:
                number = int(ticket.request_id)
                self._requests[number] = _Unread(number, ticket, threading.Condition(self._lock))

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """They were refused."""
        with self._lock:
            for ticket in tickets:
                del self._requests[int(ticket.request_id)]

    def post(self, items: list[Item]) -> None:
        """In the engine's thread."""
        with self._lock:
            for ticket, item in items:
                unread = self._requests.get(int(ticket.request_id))
                if unread is None or unread.is_final:
                    continue
                unread.take_in(item)
                self._ready[unread.request_id] = unread
                if unread.is_final:
                    self._ended[unread.request_id] = unread
                unread.changed.notify_all()
            self._any_changed.notify_all()
            self._drop_oldest()

    def stop(self, refusal: EngineUnavailableError) -> None:
        """Nothing more comes, for this reason."""
        with self._lock:
            self._refusal = refusal
            self._any_changed.notify_all()

    def ticket(self, request_id: int) -> Ticket:
        """That of a request whose last response nobody has taken. Raises UnknownRequestError."""
        with self._lock:
            return self._find(request_id).ticket

    def num_ready(self, request_id: int | None) -> int:
        """Responses that could be taken, of one request or of all. Raises UnknownRequestError."""
        with self._lock:
            return len(self._ready) if request_id is None else int(self._find(request_id).is_ready)

    def take_any(self, timeout: float | None) -> list[Response]:
        """All there are; waits for the first of them, until ``timeout`` seconds have passed.

        Raises:
          EngineUnavailableError: nothing is there and nothing will come.
        """
        deadline = _deadline(timeout)
        with self._lock:
            while not self._ready:
                if self._refusal is not None:
                    raise self._refusal
                if not _wait(self._any_changed, deadline):
                    return []
            return [response for unread in list(self._ready.values()) for response in self._take(unread)]

    def take(self, request_ids: Sequence[int], timeout: float | None) -> list[list[Response]]:
        """Those of some requests; waits until each has one, or ``timeout`` seconds have passed.

        Raises:
          UnknownRequestError: there is no such request, or its last response was taken, be it by another thread
            while this one waited.
        """
        deadline = _deadline(timeout)
        with self._lock:
            found = [self._find(request_id) for request_id in request_ids]
            for unread in found:
                unread.num_waiting += 1
            try:
                self._wait_for_each(found, deadline)
                return [self._take(unread) for unread in found]
            finally:
                for unread in found:
                    unread.num_waiting -= 1
                self._drop_oldest()

    def _wait_for_each(self, found: list[_Unread], deadline: float | None) -> None:
        for unread in found:
            while not unread.is_ready and not unread.is_gone:
                if not _wait(unread.changed, deadline):
                    return
        for unread in found:
            if unread.is_gone:
                self._find(unread.request_id)  # raises

    def _find(self, request_id: int) -> _Unread:
        unread = self._requests.get(request_id)
        if unread is None:
            raise UnknownRequestError(
                "request_id", request_id, "no request of this id has a response to come"
            )
        return unread

    def _take(self, unread: _Unread) -> list[Response]:
        if not unread.is_ready or unread.is_gone:
            return []
        response = Response(unread.request_id, unread.output, unread.error, unread.is_final)
        unread.output = None
        del self._ready[unread.request_id]
        if unread.is_final:
            self._remove(unread)
        return [response]

    def _remove(self, unread: _Unread) -> None:
        unread.is_gone = True
        del self._ended[unread.request_id], self._requests[unread.request_id]
        unread.changed.notify_all()  # others who wait for it

    def _drop_oldest(self) -> None:
        if len(self._ended) <= self.max_unread:
            return
        idle = [each for each in self._ended.values() if not each.num_waiting]
        for unread in idle[: max(0, len(idle) - self.max_unread)]:
            del self._ready[unread.request_id]
            self._remove(unread)
            if not self.num_dropped:
                logger.warning("responses are dropped: more than %d wait for nobody", self.max_unread)
            self.num_dropped += 1

    def check_invariants(self) -> None:
        """Asserts the invariants."""
        with self._lock:
            requests = self._requests
            assert set(self._ready) == {i for i, each in requests.items() if each.is_ready}, "ready"
            assert set(self._ended) == {i for i, each in requests.items() if each.is_final}, "ended"
            assert not any(each.is_gone for each in requests.values()), "a request that is gone"
            idle = sum(not each.num_waiting for each in self._ended.values())
            assert idle <= self.max_unread, "too many responses that nobody waits for"


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _wait(condition: threading.Condition, deadline: float | None) -> bool:
    """Waits to be woken; False once the deadline has passed."""
    if deadline is None:
        return condition.wait()
    seconds = deadline - time.monotonic()
    if seconds > 0:
        condition.wait(min(seconds, threading.TIMEOUT_MAX))
    return seconds > 0

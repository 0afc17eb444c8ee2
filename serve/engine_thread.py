"""The one thread that owns an Engine: takes requests in between two steps, hands out what each step brings.

Everybody else talks to it through commands in a queue: ``submit`` a ticket, ``cancel`` it, ``call`` a function. What
comes back is posted to the ticket's mailbox, all outputs of a step for one mailbox at once, so that waking an event
loop costs once a step and not once a request.
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

from jaxpaged import Engine, RequestOutput
from jaxpaged.errors import InvalidRequestError, UnknownRequestError
from jaxpaged.serve.engine_errors import (
    EngineDeadError,
    EngineDrainingError,
    EngineNotReadyError,
    EngineUnavailableError,
    QueueFullError,
)
from jaxpaged.serve.engine_health import EngineHealth
from jaxpaged.serve.engine_state import EngineState, MakeEngine, StartCancelledError, StartProgress
from jaxpaged.serve.listeners import Listener, Listeners, note_gaps
from jaxpaged.serve.tickets import Item, Mailbox, Ticket, aborted_output

__all__ = [
    "EngineDeadError",
    "EngineDrainingError",
    "EngineNotReadyError",
    "EngineState",
    "EngineThread",
    "EngineUnavailableError",
    "Listener",
    "Mailbox",
    "MakeEngine",
    "QueueFullError",
    "StartProgress",
    "Ticket",
]

logger = logging.getLogger(__name__)

# Seconds of a turn spent on taking in new requests while others run; what is left waits for the next step.
MAX_ADMISSION_SECONDS = 0.004
# Who is told to come back later is told so many seconds at least and at most.
RETRY_AFTER_RANGE = (1.0, 60.0)


class EngineThread:
    """Runs an engine until it is closed or dies.

    Args:
      make_engine: an engine, or what makes one when it is called in the thread, with a function to tell progress to;
        that function raises when the engine is closed meanwhile.
      max_queue_length: sequences that may wait beyond the ``max_num_seqs`` that run.

    Raises:
      InvalidRequestError: ``max_queue_length`` is no integer, or negative.

    Invariants: ``num_unfinished`` is the sum of the weights of the tickets that were taken and have not got their
    last item; every ticket that was taken gets a last item, whatever happens.
    """

    def __init__(self, make_engine: MakeEngine | Engine, *, max_queue_length: int = 1024) -> None:
        check_limit("max_queue_length", max_queue_length, 0)
        self._make_engine = make_engine
        self.max_queue_length = max_queue_length
        self.state = EngineState.STARTING
        self.progress = StartProgress("loading")
        self.error: BaseException | None = None
        self.engine: Engine | None = None
        self.num_unfinished = 0  # sequences
        # Guards what both sides change: state, num_unfinished, the way into the queue. A stream that the garbage
        # collector drops, at whatever moment, cancels its request: so a thread may take the lock again.
        self._lock = threading.RLock()
        self._has_ended = False  # the thread takes no more commands
        # Everything goes through here, so that it happens in the order in which it was asked for.
        self._commands: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._arrived: deque[Ticket] = deque()  # not yet with the engine
        self._tickets: dict[str, Ticket] = {}  # with the engine
        self.listeners = Listeners(self._tickets.get)
        self._waiting_for_idle: list[Future[None]] = []
        self._ready, self._stopped = _new_event(), _new_event()
        self._started = time.monotonic()
        self._finish_times: deque[float] = deque(maxlen=64)
        self._thread = threading.Thread(target=self._run, name="jaxpaged-engine", daemon=True)
        self._thread.start()
        # A thread that is with the device while the interpreter goes away takes the process down with it.
        atexit.register(self.close)

    # What other threads call.

    @property
    def ready(self) -> "Future[None]":
        """Done once the engine takes requests; fails when it cannot start."""
        return self._ready

    @property
    def stopped(self) -> "Future[None]":
        """Done when nothing more comes: it was closed or is dead, and everybody has been told."""
        return self._stopped

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def check_available(self, weight: int = 1) -> None:
        """Raises what ``submit`` would of a request for so many sequences."""
        with self._lock:
            self._check_available(weight)

    def _check_available(self, weight: int, num_requests: int = 1) -> None:
        if (refusal := self.refusal()) is not None:
            raise refusal
        if self.state is EngineState.DRAINING:
            raise EngineDrainingError("the engine is shutting down")
        assert self.engine is not None, "ready without an engine"
        limit = self.engine.config.max_num_seqs + self.max_queue_length
        # One that is alone is let in whatever it asks for: the engine knows whether it can be.
        is_alone = num_requests == 1 and not self.num_unfinished
        if self.num_unfinished + weight > limit and not is_alone:
            message = f"the queue is full: {self.num_unfinished} sequences under way, at most {limit}"
            raise QueueFullError(message, self._retry_after())

    def refusal(self) -> EngineUnavailableError | None:
        """Why there is no engine to do anything with; None when there is."""
        if self.state in (EngineState.DEAD, EngineState.CLOSED):
            return self._dead()
        return EngineNotReadyError("the engine is starting") if self.engine is None else None

    def submit(self, *tickets: Ticket) -> None:
        """Takes requests, all or none; a mailbox gets the outputs, or the InvalidRequestError that says what is wrong.

        Raises:
          EngineUnavailableError: the engine starts, drains or is dead.
          QueueFullError: too many requests are under way.
        """
        weight = sum(ticket.weight for ticket in tickets)
        with self._lock:
            self._check_available(weight, len(tickets))
            self.num_unfinished += weight
            self._commands.put(lambda: self._arrived.extend(tickets))

    def _put(self, command: Callable[[], None]) -> bool:
        """Has the thread run a command; whether it will."""
        with self._lock:
            if not self._has_ended:
                self._commands.put(command)
            return not self._has_ended

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request, if it has not ended yet, and frees what it holds; it gets its last output."""
        if not ticket.done:
            ticket.cancelled = True
            self._put(lambda: self._abort(ticket))

    def call(self, function: Callable[[Engine], Any]) -> "Future[Any]":
        """Runs a function in the engine's thread, between two steps; at once when there is nothing else to do.

        The future fails with EngineUnavailableError when there is no engine to run it on.
        """
        future: Future[Any] = Future()
        refusal = self.refusal()
        if refusal is not None or not self._put(lambda: self._answer(function, future)):
            future.set_exception(refusal or self._dead())
        return future

    def drain(self) -> "Future[None]":
        """Takes nothing new from now on; the future is done when all that was taken has ended."""
        future = _new_event()
        with self._lock:
            if self.state in (EngineState.STARTING, EngineState.READY):
                self.state = EngineState.DRAINING
        if not self._put(lambda: self._waiting_for_idle.append(future)):
            future.set_result(None)
        return future

    def abort(self, request_id: str) -> "Future[None]":
        """Ends a request by its id, as ``cancel`` does; the future fails with UnknownRequestError if none has it."""
        return self.call(lambda engine: self._abort_by_id(engine, request_id))

    def abort_all(self) -> None:
        """Ends all requests; each gets its last output, or EngineDrainingError if it had not begun."""
        self._put(self._abort_all)

    def close(self, timeout: float | None = None) -> None:
        """Ends all requests, closes the engine and waits for the thread; closing twice is fine."""
        with self._lock:
            if self.state is not EngineState.DEAD:
                self.state = EngineState.CLOSED
        self._put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        if not self._thread.is_alive():
            atexit.unregister(self.close)

    # What runs in the thread.

    def _run(self) -> None:
        try:
            self._start()
            while self.state is not EngineState.CLOSED:
                self._take_commands()
                if self._arrived and not self._health.is_in_doubt:
                    self._admit()
                if self._tickets or (self.engine is not None and self.engine.has_unfinished_requests):
                    self._step()
                if self._waiting_for_idle and not self._tickets and not self._arrived:
                    self._tell_idle()
            self._end(None)
        except BaseException as error:
            self._end(error)

    def _start(self) -> None:
        made = self._make_engine
        engine = made if isinstance(made, Engine) else made(self._tell_progress)
        self._health = EngineHealth(engine)
        engine.add_listener(self.listeners)
        with self._lock:
            self.engine = engine
            if self.state is EngineState.CLOSED:
                raise StartCancelledError("closed before it had started")
            if self.state is EngineState.STARTING:
                self.state = EngineState.READY
        self.progress = StartProgress("ready", seconds=time.monotonic() - self._started)
        logger.info("the engine is ready after %.1f s", self.progress.seconds)
        self._ready.set_result(None)

    def _tell_progress(self, progress: StartProgress) -> None:
        if self.state is not EngineState.STARTING:
            raise StartCancelledError("closed before it had started")
        self.progress = progress

    def _take_commands(self) -> None:
        """Runs all commands there are; waits for one when there is nothing else to do."""
        assert self.engine is not None, "no engine"
        if self.state is EngineState.CLOSED:
            return
        has_work = self._arrived or self._tickets or self.engine.has_unfinished_requests
        if not has_work and not self._waiting_for_idle:
            self._commands.get()()
        for _ in range(self._commands.qsize()):
            self._commands.get_nowait()()

    def _admit(self) -> None:
        """Gives the engine the requests that have arrived, as many as there is time for."""
        engine, begun = self.engine, time.perf_counter()
        assert engine is not None, "no engine"
        while self._arrived:
            ticket = self._arrived.popleft()
            if ticket.cancelled:
                self._conclude(ticket, aborted_output(ticket))
                continue
            self._let_go(ticket.request_id)
            try:
                engine.add_request(ticket.request_id, ticket.prompt, ticket.params, **ticket.handling)
            except Exception as error:
                if not isinstance(error, ValueError):
                    logger.exception("request %s could not be taken in", ticket.request_id)
                self._conclude(ticket, error)
                continue
            self._tickets[ticket.request_id] = ticket
            if time.perf_counter() - begun > MAX_ADMISSION_SECONDS and len(self._tickets) > 1:
                return

    def _let_go(self, request_id: str) -> None:
        """Delivers the last output of a request that has ended, so that the next may have its id."""
        engine = self.engine
        assert engine is not None, "no engine"
        if request_id in self._tickets and all(r.request_id != request_id for r in engine.live_requests()):
            self._step()
            self._give_up([ticket for name, ticket in self._tickets.items() if name == request_id])

    def _step(self) -> None:
        """Runs a step and delivers what it brings."""
        assert self.engine is not None, "no engine"
        outputs = self._health.step()
        self._deliver(outputs)
        if self._tickets and not outputs and not self.engine.has_unfinished_requests:
            self._give_up(list(self._tickets.values()))

    def _give_up(self, tickets: list[Ticket]) -> None:
        """Ends requests whose outputs are lost: somebody's function has taken them, or ending them has failed."""
        for ticket in tickets:
            logger.error("request %s has ended without a last output", ticket.request_id)
            del self._tickets[ticket.request_id]
            self._conclude(ticket, RuntimeError("the last output was lost"))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Posts the outputs of a step, and tells listeners of the gaps between tokens."""
        posts: dict[Mailbox, list[Item]] = {}
        gaps: dict[float, int] = {}
        for output in outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is None:
                continue  # of somebody's function
            note_gaps(ticket, output, gaps)
            if output.finished:
                del self._tickets[ticket.request_id]
                self._finish(ticket)
            posts.setdefault(ticket.mailbox, []).append((ticket, output))
        for mailbox, items in posts.items():
            self._post(mailbox, items)
        self.listeners.gaps(gaps)

    def _post(self, mailbox: Mailbox, items: list[Item]) -> None:
        """Passes outputs on; requests whose mailbox is gone, as with its event loop, end."""
        try:
            mailbox.post(items)
        except Exception as error:
            logger.warning("nobody takes the outputs of %d requests: %s", len(items), error)
            for ticket, _ in items:
                ticket.cancelled = True
                self._abort(ticket)

    def _finish(self, ticket: Ticket) -> None:
        """Its last item is there."""
        ticket.done = True
        with self._lock:
            self._finish_times.append(time.monotonic())
            self.num_unfinished -= ticket.weight
            if not self.num_unfinished:
                self._finish_times.clear()  # how long nobody comes says nothing of how fast requests end

    def _conclude(self, ticket: Ticket, item: RequestOutput | Exception) -> None:
        """Gives a request that the engine does not have its last item, unless it has got it."""
        if not ticket.done:
            self._finish(ticket)
            self._post(ticket.mailbox, [(ticket, item)])

    def _abort(self, ticket: Ticket) -> None:
        """Has the engine end a request that it has; the last output comes from the next step."""
        if self.engine is None or self._tickets.get(ticket.request_id) is not ticket:
            return
        try:
            self.engine.abort_request(ticket.request_id)
        except UnknownRequestError:
            pass  # it has ended: its last output is on the way
        except Exception as error:
            logger.exception("request %s could not be ended", ticket.request_id)
            del self._tickets[ticket.request_id]
            self._conclude(ticket, error)

    def _abort_by_id(self, engine: Engine, request_id: str) -> None:
        try:
            engine.abort_request(request_id)
        except UnknownRequestError:
            found = [each for each in self._arrived if each.request_id == request_id and not each.cancelled]
            if not found:
                raise
            found[0].cancelled = True

    def _abort_all(self) -> None:
        while self._arrived:
            ticket = self._arrived.popleft()
            refused = EngineDrainingError("the engine is shutting down")
            self._conclude(ticket, aborted_output(ticket) if ticket.cancelled else refused)
        for ticket in list(self._tickets.values()):
            self._abort(ticket)

    def _answer(self, function: Callable[[Engine], Any], future: "Future[Any]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self.engine is None or self._has_ended:
                raise self._dead()
            future.set_result(function(self.engine))
        except BaseException as error:  # it is the caller's, be it SystemExit
            # An asyncio future cannot hold it: whoever awaits would wait for ever.
            is_stop = isinstance(error, StopIteration)
            future.set_exception(RuntimeError("the function raised StopIteration") if is_stop else error)

    def _tell_idle(self) -> None:
        for future in self._waiting_for_idle:
            future.set_result(None)
        self._waiting_for_idle.clear()

    def _end(self, error: BaseException | None) -> None:
        """The thread ends: everybody who waits is told."""
        with self._lock:
            is_failure = error is not None and not isinstance(error, StartCancelledError)
            self.error = error if is_failure else None
            self.state = EngineState.DEAD if is_failure else EngineState.CLOSED
            self._has_ended = True
        if is_failure:
            logger.critical("the engine is dead: %s", error, exc_info=error)
        while not self._commands.empty():
            self._commands.get_nowait()()
        tickets = [*self._tickets.values(), *self._arrived]
        self._tickets.clear()
        self._arrived.clear()
        for ticket in tickets:
            self._conclude(ticket, self._dead())
        if self.engine is not None:
            try:
                self.engine.close()
            except Exception:
                logger.exception("closing the engine failed")
        if not self._ready.done():
            self._ready.set_exception(self._dead())
        self._tell_idle()
        self._stopped.set_result(None)

    def _dead(self) -> EngineDeadError:
        if self.error is None:
            return EngineDeadError("the engine was closed")
        dead = EngineDeadError(f"the engine has failed: {type(self.error).__name__}: {self.error}")
        dead.__cause__ = self.error
        return dead

    def _retry_after(self) -> float:
        """Seconds until a place should be free, from how fast requests have ended of late."""
        times, (low, high) = self._finish_times, RETRY_AFTER_RANGE
        if len(times) < 2:
            return low
        seconds = (time.monotonic() - times[0]) / (len(times) - 1)
        return min(high, max(low, seconds))


def check_limit(name: str, value: int, least: int) -> None:
    """Raises InvalidRequestError unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidRequestError(name, value, f"must be an integer of at least {least}")


def _new_event() -> "Future[None]":
    """A future that several may wait for: one of them who gives up, as a task that is cancelled, cannot cancel it."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future

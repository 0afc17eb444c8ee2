"""The engine for ``asyncio``: streams of outputs, cancelling, draining, while one thread of its own does the work."""

import asyncio
import itertools
import secrets
import weakref
from collections.abc import Callable
from typing import Any, Self, TypeVar

from jaxpaged import BeamSearchParams, Engine, EngineStats, RequestOutput, RequestOutputKind, SamplingParams
from jaxpaged.config import EngineConfig
from jaxpaged.models import ModelConfig
from jaxpaged.serve.engine_errors import EngineUnavailableError
from jaxpaged.serve.engine_state import EngineState, MakeEngine, StartProgress
from jaxpaged.serve.engine_thread import EngineThread
from jaxpaged.serve.listeners import Listener
from jaxpaged.serve.output_merge import merge
from jaxpaged.serve.tickets import Item, Ticket
from jaxpaged.tokenizer import Tokenizer

T = TypeVar("T")
CLOCK_TOLERANCE = 0.002  # seconds; event loops count in milliseconds


class AsyncEngine:
    """An engine that serves, used from one event loop or several.

    ::

        async with AsyncEngine(Engine("path/to/checkpoint")) as engine:
            async for output in engine.generate("def main(", SamplingParams(max_tokens=64)):
                print(output.outputs[0].text, end="")

    A request whose step fails gets the error, and the engine goes on; if it cannot, everybody who waits gets
    EngineDeadError, and so does who comes later.

    Args:
      make_engine: an ``Engine``, which from now on belongs to this object, or what makes one when it is called in the
        engine's thread with a function that it tells its ``StartProgress`` to.
      max_queue_length: sequences that may wait beyond the ``max_num_seqs`` that run; further ones are refused.
    """

    def __init__(self, make_engine: MakeEngine | Engine, *, max_queue_length: int = 1024) -> None:
        self._thread = EngineThread(make_engine, max_queue_length=max_queue_length)
        self._mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopMailbox]
        self._mailboxes = weakref.WeakKeyDictionary()
        # No id that anybody else would choose.
        self._ids = map(f"async-{secrets.token_hex(4)}-{{}}".format, itertools.count())

    @property
    def state(self) -> EngineState:
        """What it is doing."""
        return self._thread.state

    @property
    def progress(self) -> StartProgress:
        """How far the start has come."""
        return self._thread.progress

    @property
    def error(self) -> BaseException | None:
        """What it died of."""
        return self._thread.error

    @property
    def num_unfinished(self) -> int:
        """Sequences under way, waiting and running."""
        return self._thread.num_unfinished

    @property
    def is_started(self) -> bool:
        """Whether there is an engine: from the end of the start to the end of the thread."""
        return self._thread.refusal() is None

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer. Safe to use from any thread."""
        return self._engine.tokenizer

    @property
    def config(self) -> EngineConfig:
        """The engine's configuration."""
        return self._engine.config

    @property
    def model_config(self) -> ModelConfig:
        """The model's configuration."""
        return self._engine.model_config

    @property
    def _engine(self) -> Engine:
        refusal = self._thread.refusal()
        if refusal is not None:
            raise refusal
        assert self._thread.engine is not None, "no engine"
        return self._thread.engine

    def add_listener(self, listener: Listener) -> None:
        """Tells ``listener`` what happens from now on, in the engine's thread."""
        self._thread.listeners.add(listener)

    def check_available(self, num_sequences: int = 1) -> None:
        """Raises what ``generate`` would of a request for so many sequences."""
        self._thread.check_available(num_sequences)

    async def wait_ready(self) -> None:
        """Returns once the engine takes requests.

        Raises:
          EngineDeadError: it could not start, or has ended since.
        """
        await asyncio.wrap_future(self._thread.ready)
        if (refusal := self._thread.refusal()) is not None:
            raise refusal

    def generate(
        self,
        prompt: Any,
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str | None = None,
        deadline: float | None = None,
        max_queue_time: float | None = None,
    ) -> "OutputStream":
        """Queues a request and returns its outputs as they come.

        Outputs hold what is new (``output_kind`` DELTA) unless the parameters ask for another kind. Arguments are
        those of ``Engine.add_request``. A long text is better given as token ids, made in another thread: the engine's
        thread would stop for it.

        Raises:
          EngineUnavailableError: the engine starts, drains or is dead.
          QueueFullError: too many requests are under way.
          InvalidRequestError: something is wrong with the request; raised by the first ``await`` for an output.
        """
        params = SamplingParams() if params is None else params
        if isinstance(params, SamplingParams) and params.output_kind is RequestOutputKind.CUMULATIVE:
            params = params.clone(output_kind=RequestOutputKind.DELTA)
        handling = {"priority": priority, "tenant": tenant, "cache_salt": cache_salt}
        handling |= {"deadline": deadline, "max_queue_time": max_queue_time}
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            mailbox = self._mailboxes[loop] = _LoopMailbox(loop)
        name = next(self._ids) if request_id is None else request_id
        ticket = Ticket(name, prompt, params, handling, mailbox)
        stream = OutputStream(self._thread, ticket, loop)
        ticket.reader = weakref.ref(stream)  # not to keep a stream alive that nobody reads any more
        self._thread.submit(ticket)
        return stream

    async def abort(self, request_id: str) -> None:
        """Ends a request by its id; its stream gets a last output with finish reason "abort".

        Raises:
          UnknownRequestError: no live request has this id.
        """
        await asyncio.wrap_future(self._thread.abort(request_id))

    async def run(self, function: Callable[[Engine], T]) -> T:
        """Runs ``function(engine)`` in the engine's thread between two steps; at once when it is idle.

        Raises:
          EngineUnavailableError: there is no engine to run it on.
        """
        return await asyncio.wrap_future(self._thread.call(function))

    async def stats(self) -> EngineStats:
        """A snapshot of the engine's counters and times."""
        return await self.run(lambda engine: engine.stats())

    def stats_from_thread(self, timeout: float) -> EngineStats | None:
        """``stats`` for a thread without an event loop; None when there is no engine, or it is busy for too long."""
        try:
            return self._thread.call(lambda engine: engine.stats()).result(timeout)
        except (EngineUnavailableError, TimeoutError):
            return None

    async def drain(self, timeout: float | None = None) -> None:
        """Takes nothing new and waits until everything under way has ended; after ``timeout`` seconds aborts it."""
        drained = asyncio.wrap_future(self._thread.drain())
        done, _ = await asyncio.wait([drained], timeout=timeout)
        if not done:
            self._thread.abort_all()
            await drained

    def abort_all(self) -> None:
        """Ends all requests; each stream gets its last output."""
        self._thread.abort_all()

    async def close(self) -> None:
        """Aborts what is left, closes the engine and ends its thread; closing twice is fine."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.close)

    async def __aenter__(self) -> Self:
        await self.wait_ready()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()


class OutputStream:
    """The outputs of one request: ``async for output in stream``.

    Cancelling whoever waits for the next output, ``aclose`` and dropping the stream abort the request. A reader that
    is slower than the engine gets outputs that hold what several steps brought: what waits for it is one output, of
    at most ``max_tokens`` tokens. What ended a request is raised once everything before it has been read.

    One task at a time may wait for it, in the event loop that it was made in.
    """

    def __init__(self, thread: EngineThread, ticket: Ticket, loop: asyncio.AbstractEventLoop) -> None:
        self._thread = thread
        self._ticket = ticket
        self._loop = loop
        self._arrived: RequestOutput | None = None
        self._error: Exception | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None
        self._wait_until = 0.0  # of the loop's clock
        self._timer: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> str:
        """The request's id in the engine."""
        return self._ticket.request_id

    def put(self, item: RequestOutput | Exception) -> None:
        """Takes what the engine brought, in the event loop's thread."""
        if self._ended:
            return  # nobody reads it any more
        if isinstance(item, Exception):
            self._error, self._ended = item, True
        elif item.error is not None:
            self._error, self._ended = item.error, True
        else:
            self._arrived = item if self._arrived is None else merge(self._arrived, item)
            self._ended = item.finished
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._has_news:
            await self._wait()
        return self._take()

    def _take(self) -> RequestOutput:
        if self._arrived is None:
            if self._error is None:
                raise StopAsyncIteration
            error, self._error = self._error, None
            raise error
        output, self._arrived = self._arrived, None
        return output

    async def next_within(self, timeout: float) -> RequestOutput | None:
        """The next output, as ``anext`` has it, or None when there is none after ``timeout`` seconds."""
        if self._arrived is None and not self._ended:
            self._set_timer(timeout)
            await self._wait()
            if self._arrived is None and not self._ended:
                return None
        return self._take()

    async def wait(self, timeout: float) -> bool:
        """Waits until ``__anext__`` would return or raise at once; whether it would, after ``timeout`` seconds."""
        if not self._has_news:
            self._set_timer(timeout)
            await self._wait()
        return self._has_news

    def _set_timer(self, timeout: float) -> None:
        """Wakes who begins to wait now when it is time.

        One timer serves many waits in a row: setting one for each token would cost more than the rest of the waiting.
        """
        self._wait_until = self._loop.time() + timeout
        if self._timer is None:
            self._timer = self._loop.call_later(timeout, _look_at_the_time, weakref.ref(self))

    def _look_at_the_time(self) -> None:
        """Wakes who has waited for long enough; else comes back when that will be so."""
        self._timer = None
        if self._waiter is None:
            return
        left = self._wait_until - self._loop.time()
        if left <= CLOCK_TOLERANCE:
            self._wake()
        else:
            self._timer = self._loop.call_later(left, _look_at_the_time, weakref.ref(self))

    async def _wait(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("another task waits for this stream")
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        except BaseException:
            self.cancel()
            raise
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def _has_news(self) -> bool:
        return self._arrived is not None or self._ended

    def raise_error(self) -> None:
        """Raises what ended the request, if that is all there is to read."""
        if self._arrived is None and self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Aborts the request, if it still runs, and forgets what it brought; for who waits for it, it has ended."""
        if not self._ended:
            self._ended = True
            self._thread.cancel(self._ticket)
        self._arrived = self._error = None
        self._wake()

    async def aclose(self) -> None:
        """The same as ``cancel``."""
        self.cancel()

    def __del__(self) -> None:
        # In whatever thread the garbage collector runs: nothing of the event loop may be touched.
        if not self._ended:
            self._thread.cancel(self._ticket)


def _look_at_the_time(stream: "weakref.ref[OutputStream]") -> None:
    if (found := stream()) is not None:
        found._look_at_the_time()


class _LoopMailbox:
    """Brings outputs into an event loop: one wake-up a step, however many requests it concerns."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)

    def post(self, items: list[Item]) -> None:
        """In the engine's thread."""
        loop = self._loop()
        if loop is None:
            raise RuntimeError("the event loop is gone")
        loop.call_soon_threadsafe(self._hand_out, items)

    def _hand_out(self, items: list[Item]) -> None:
        for ticket, item in items:
            if (stream := ticket.reader()) is not None:
                stream.put(item)

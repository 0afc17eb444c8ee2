"""The engine for threads: requests go in by number, responses come out to whoever asks, as in TensorRT-LLM."""

import itertools
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, overload

from jaxpaged import BeamSearchParams, Engine, RequestOutputKind, SamplingParams
from jaxpaged.errors import InvalidRequestError
from jaxpaged.intake import Handling, Prompt
from jaxpaged.models import Decoder
from jaxpaged.records import IterationRecord, RequestRecord
from jaxpaged.serve.engine_errors import EngineUnavailableError, QueueFullError
from jaxpaged.serve.engine_thread import EngineThread, check_limit
from jaxpaged.serve.executor_responses import Response, Responses
from jaxpaged.serve.tickets import Ticket

__all__ = ["Executor", "ExecutorRequest", "Response"]

# Records of steps and of requests that are kept until somebody asks for them.
MAX_RECORDS = 1000


@dataclass(frozen=True, kw_only=True)
class ExecutorRequest:
    """A request for an ``Executor``; checked when it is built, as far as it can be without the model.

    Attributes are the arguments of ``Engine.add_request``, which says what each is. It gets one response, at its end;
    with ``params`` whose ``output_kind`` is DELTA one whenever there is something new.

    Raises InvalidRequestError naming argument and value.
    """

    prompt: Prompt
    params: SamplingParams | BeamSearchParams | None = None
    priority: int = 0
    tenant: str = ""
    cache_salt: str | None = None
    deadline: float | None = None
    max_queue_time: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.params, SamplingParams | BeamSearchParams | None):
            raise InvalidRequestError("params", self.params, "must be a SamplingParams or BeamSearchParams")
        Handling(**self.handling)

    @property
    def handling(self) -> dict[str, Any]:
        """What is neither prompt nor parameters."""
        names = ("priority", "tenant", "cache_salt", "deadline", "max_queue_time")
        return {name: getattr(self, name) for name in names}


class Executor:
    """An engine in a thread of its own, for threads that call it, with the names of TensorRT-LLM's ``Executor``.

    ::

        with Executor("path/to/checkpoint") as executor:
            ids = [executor.enqueue_request(prompt, SamplingParams(max_tokens=64)) for prompt in prompts]
            for (response,) in executor.await_responses(ids):
                print(response.output.outputs[0].text)

    All methods may be called from any thread.

    Args:
      model: what ``Engine`` takes, or an ``Engine``, which from now on belongs to this object.
      max_queue_length: sequences that may wait beyond the ``max_num_seqs`` that run; further ones are refused.
      max_unread: requests that have ended and whose last response waits for somebody who asks; of more than these
        the oldest are dropped, and are then unknown.
      **arguments: of ``Engine``, which raises what is wrong with them.

    Raises:
      InvalidRequestError: a limit is no integer or too small, or an engine comes with arguments for another.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Decoder | Engine,
        *,
        max_queue_length: int = 1024,
        max_unread: int = 10_000,
        **arguments: Any,
    ) -> None:
        check_limit("max_queue_length", max_queue_length, 0)
        check_limit("max_unread", max_unread, 1)
        if isinstance(model, Engine) and arguments:
            raise InvalidRequestError(*next(iter(arguments.items())), "comes too late: the engine is there")
        engine = model if isinstance(model, Engine) else Engine(model, **arguments)
        self._ids = itertools.count(1)
        self._responses = Responses(max_unread)
        self._latest = _Latest()
        self._thread = EngineThread(engine, max_queue_length=max_queue_length)
        self._thread.listeners.add(self._latest)
        self._thread.stopped.add_done_callback(self._stop)
        try:
            self._thread.ready.result()
        except EngineUnavailableError as error:
            raise error.__cause__ or error from None

    def _stop(self, _: "Future[None]") -> None:
        refusal = self._thread.refusal()
        assert refusal is not None, "stopped without a reason"
        self._responses.stop(refusal)

    def enqueue_request(
        self,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str | None = None,
        deadline: float | None = None,
        max_queue_time: float | None = None,
    ) -> int:
        """Queues a request; arguments and errors are those of ``enqueue_requests``. Returns its id."""
        request = ExecutorRequest(
            prompt=prompt,
            params=params,
            priority=priority,
            tenant=tenant,
            cache_salt=cache_salt,
            deadline=deadline,
            max_queue_time=max_queue_time,
        )
        return self.enqueue_requests([request])[0]

    def enqueue_requests(self, requests: Sequence[ExecutorRequest]) -> list[int]:
        """Queues requests, all of them or none, and returns their ids, which count up.

        What is wrong with a text or its tokens is found when the engine gets it, and comes as the error of a response.

        Raises:
          InvalidRequestError: something is wrong with one of them.
          EngineUnavailableError: the engine is shut down or dead.
          QueueFullError: there is no room for all of them.
        """
        if (refusal := self._thread.refusal()) is not None:
            raise refusal
        every = [self._checked(request) for request in requests]
        if not every:
            return []
        tickets = [
            Ticket(str(next(self._ids)), request.prompt, params, request.handling, self._responses)
            for request, params in zip(requests, every, strict=True)
        ]
        self._responses.expect(tickets)
        try:
            self._thread.submit(*tickets)
        except BaseException:
            self._responses.forget(tickets)
            raise
        return [int(ticket.request_id) for ticket in tickets]

    def _checked(self, request: ExecutorRequest) -> SamplingParams | BeamSearchParams:
        """The parameters to run a request with, which fits the model as far as that is known at once."""
        if not isinstance(request, ExecutorRequest):
            raise InvalidRequestError("requests", request, "must be ExecutorRequest objects")
        engine, params = self._thread.engine, request.params
        assert engine is not None, "no engine"
        vocab_size, config = engine.model_config.vocab_size, engine.config
        if isinstance(request.prompt, str) and engine.tokenizer is None:
            raise InvalidRequestError("prompt", request.prompt, "this model has no tokenizer; pass token ids")
        if not hasattr(request.prompt, "__len__") or not len(request.prompt):
            raise InvalidRequestError("prompt", request.prompt, "must be text or token ids, and not empty")
        if isinstance(params, BeamSearchParams):
            params.validate_for(vocab_size)
            return params
        params = SamplingParams() if params is None else params
        params.validate_for(
            vocab_size, config.max_logprobs, config.max_model_len, engine.tokenizer is not None
        )
        is_streamed = params.output_kind is RequestOutputKind.DELTA
        return params if is_streamed else params.clone(output_kind=RequestOutputKind.FINAL_ONLY)

    @overload
    def await_responses(self, ids: int | None = None, timeout: float | None = None) -> list[Response]: ...

    @overload
    def await_responses(self, ids: Sequence[int], timeout: float | None = None) -> list[list[Response]]: ...

    def await_responses(
        self, ids: int | Sequence[int] | None = None, timeout: float | None = None
    ) -> list[Response] | list[list[Response]]:
        """Takes the responses that are there; waits for one, but no longer than ``timeout`` seconds.

        What a request brought since its last response is one response. After an error or its end comes no other.

        Args:
          ids: an id, for a list of its responses; None for those of all requests; several ids, for a list each:
            this waits until each has one.
          timeout: seconds, after which lists are empty where nothing came; None for no limit.

        Raises:
          UnknownRequestError: there was no such request, or its last response was taken or dropped.
          EngineDeadError: ``ids`` is None, nothing is left, and the engine is shut down or dead.
        """
        if ids is None:
            return self._responses.take_any(timeout)
        if isinstance(ids, int):
            return self._responses.take([ids], timeout)[0]
        return self._responses.take(ids, timeout)

    def get_num_responses_ready(self, id: int | None = None) -> int:
        """How many responses could be taken now, of one request or of all.

        Raises:
          UnknownRequestError: as ``await_responses``.
        """
        return self._responses.num_ready(id)

    def cancel_request(self, id: int) -> None:
        """Ends a request, which gets a last response with finish reason "abort" unless it has ended already.

        Raises:
          UnknownRequestError: as ``await_responses``.
        """
        self._thread.cancel(self._responses.ticket(id))

    def can_enqueue_requests(self) -> bool:
        """Whether a request for one sequence would be taken now."""
        try:
            self._thread.check_available()
        except (EngineUnavailableError, QueueFullError):
            return False
        return True

    def get_latest_iteration_stats(self) -> list[IterationRecord]:
        """Records of the steps since the last call, the newest last; no more than the latest thousand."""
        return self._latest.take_iterations()

    def get_latest_request_stats(self) -> list[RequestRecord]:
        """Records of the completions that ended since the last call; ``request_id`` is the id as a string."""
        return self._latest.take_requests()

    def shutdown(self, timeout: float | None = None) -> None:
        """Takes nothing new, waits until everything under way has ended, and closes the engine.

        After ``timeout`` seconds the rest is aborted. Responses can be taken afterwards, too. A second call does no
        harm.
        """
        drained = self._thread.drain()
        try:
            drained.result(timeout)
        except TimeoutError:
            self._thread.abort_all()
            drained.result()
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.shutdown(None if kind is None else 0.0)


class _Latest:
    """Listens, and keeps what nobody has asked for yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._iterations: deque[IterationRecord] = deque(maxlen=MAX_RECORDS)
        self._requests: deque[RequestRecord] = deque(maxlen=MAX_RECORDS)

    def stepped(self, record: IterationRecord) -> None:
        with self._lock:
            self._iterations.append(record)

    def ended(self, record: RequestRecord) -> None:
        with self._lock:
            self._requests.append(record)

    def gaps(self, gaps: Mapping[float, int]) -> None:
        """Not asked for."""

    def take_iterations(self) -> list[IterationRecord]:
        with self._lock:
            taken = list(self._iterations)
            self._iterations.clear()
        return taken

    def take_requests(self) -> list[RequestRecord]:
        with self._lock:
            taken = list(self._requests)
            self._requests.clear()
        return taken

"""One HTTP request as requests to the engine: submitting them, what they cost, and how they may end."""

import contextlib
import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpaged import CompletionOutput, RequestOutput, SamplingParams
from jaxpaged.serve.async_engine import OutputStream
from jaxpaged.serve.server.failures import RequestFailure, failure_of
from jaxpaged.serve.server.protocol import SamplingRequest
from jaxpaged.serve.server.responses import ChunkUsage, PromptTokensDetails, Usage
from jaxpaged.serve.server.service import Service

logger = logging.getLogger(__name__)

# Finish reasons that OpenAI's API does not have: the request has failed.
UNFINISHED = {
    "timeout": (504, "the request took longer than it may", "request_timeout"),
    "abort": (503, "the request was aborted: the server is shutting down", "aborted"),
    "error": (500, "the request failed", "request_failed"),
}


@dataclass
class Job:
    """What an HTTP request has the engine do.

    Attributes:
      id: of the answer, such as "cmpl-...".
      model: the name that answers carry.
      streams: outputs of the engine, one stream a prompt.
      details: what the access log is told.
    """

    service: Service
    body: SamplingRequest
    params: SamplingParams
    id: str
    model: str
    details: dict[str, Any]
    prompts: Sequence[Sequence[int]] = ()
    streams: list[OutputStream] = field(default_factory=list)
    num_completion_tokens: int = 0
    _num_cached: dict[str, int] = field(default_factory=dict)

    def submit(self, prompts: Sequence[Sequence[int]], tenant: str) -> None:
        """Hands all prompts to the engine, or none.

        Raises:
          RequestFailure: there could never be room for all of them.
          QueueFullError: there is no room for all of them now.
          EngineUnavailableError: there is no engine to take them.
        """
        engine, options = self.service.engine, self.service.options
        salt = self.body.cache_salt
        if tenant and not options.share_prefixes:
            salt = f"{tenant}/{salt or ''}"  # what others have asked before cannot be told from how long one waits
        num_sequences = len(prompts) * self.params.num_completions
        most = engine.config.max_num_seqs + options.max_queue_length
        if len(prompts) > 1 and num_sequences > most:
            message = (
                f"prompt: {num_sequences} completions in all are more than this server's queue holds ({most})"
            )
            raise RequestFailure(400, message, param="prompt")
        engine.check_available(num_sequences)
        self.prompts = prompts
        for number, ids in enumerate(prompts):
            self.streams.append(
                engine.generate(
                    {"prompt_token_ids": ids},
                    self.params,
                    # Not the id alone: a client may choose it, and choose it twice.
                    request_id=f"{self.id}-{number}-{secrets.token_hex(4)}",
                    priority=self.body.priority,
                    cache_salt=salt,
                    tenant=tenant,
                    deadline=options.request_timeout,
                    max_queue_time=options.max_queue_time,
                )
            )
        self.details["model"] = self.model
        self.details["prompt_tokens"] = sum(map(len, prompts))

    async def first(self) -> None:
        """Waits until the engine has something to say, for a while: what is wrong then has a status of its own."""
        stream = self.streams[0]
        if await stream.wait(self.service.options.keep_alive_interval):
            with self.failing():
                stream.raise_error()

    async def results(self) -> list[RequestOutput]:
        """The one output of each prompt.

        Raises:
          RequestFailure: one of them was not finished.
        """
        with self.failing():
            outputs = [await anext(stream) for stream in self.streams]
        for output in outputs:
            self.note(output)
            for completion in output.outputs:
                self.check_end(completion)
        return outputs

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Turns whatever ends a request into the failure it is answered with, and logs what is not the client's."""
        try:
            yield
        except Exception as error:
            failure = failure_of(error)
            self.details["error"] = failure.reason
            if failure.status == 500:
                logger.error("%s failed: %s: %s", self.id, type(error).__name__, error)
            raise failure from error

    def note(self, output: RequestOutput) -> None:
        """Counts what an output brings."""
        if output.finished or output.request_id not in self._num_cached:
            self._num_cached[output.request_id] = output.num_cached_tokens
        for completion in output.outputs:
            self.num_completion_tokens += len(completion.token_ids)
        if output.finished:
            self._note_end(output)

    def _note_end(self, output: RequestOutput) -> None:
        details, metrics = self.details, output.metrics
        details["completion_tokens"] = self.num_completion_tokens
        details["cached_tokens"] = sum(self._num_cached.values())
        details["finish_reason"] = next((c.finish_reason for c in output.outputs if c.finish_reason), None)
        if metrics is not None and metrics.first_token_time is not None:
            details["time_to_first_token"] = metrics.first_token_time - metrics.arrival_time
        if metrics is not None and metrics.first_scheduled_time is not None:
            details["queue_time"] = metrics.first_scheduled_time - metrics.arrival_time

    def check_end(self, completion: CompletionOutput) -> None:
        """Raises RequestFailure for a completion that ended otherwise than it may."""
        if completion.finish_reason in UNFINISHED:
            status, message, code = UNFINISHED[completion.finish_reason]
            raise RequestFailure(status, message, code=code)

    def usage(self) -> Usage:
        """Tokens so far."""
        num_prompt = sum(map(len, self.prompts))
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self.num_completion_tokens,
            total_tokens=num_prompt + self.num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached.values())),
        )

    def chunk_usage(self) -> ChunkUsage:
        """The same for a chunk."""
        usage = self.usage()
        cached = 0 if usage.prompt_tokens_details is None else usage.prompt_tokens_details.cached_tokens
        numbers = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
        return ChunkUsage(*numbers, {"cached_tokens": cached})

    def close(self) -> None:
        """Aborts what still runs."""
        for stream in self.streams:
            stream.cancel()


def new_job(
    service: Service, body: SamplingRequest, params: SamplingParams, prefix: str, state: dict[str, Any]
) -> Job:
    """A job that answers a request whose ASGI state is ``state``."""
    name = body.request_id or state.get("request_id") or secrets.token_hex(16)
    return Job(
        service,
        body,
        params,
        f"{prefix}-{name}",
        service.check_model(body.model),
        state.setdefault("access", {}),
    )

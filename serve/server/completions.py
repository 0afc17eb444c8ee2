"""``POST /v1/completions``."""

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxpaged import CompletionOutput, RequestOutput
from jaxpaged.errors import InvalidRequestError
from jaxpaged.outputs import Logprob
from jaxpaged.serve.server.failures import RequestFailure
from jaxpaged.serve.server.jobs import Job, new_job
from jaxpaged.serve.server.logprob_formats import TextOffsets, completion_logprobs, prompt_logprobs
from jaxpaged.serve.server.protocol import CompletionRequest
from jaxpaged.serve.server.responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    TextChunkChoice,
)
from jaxpaged.serve.server.route_docs import GENERATION_RESPONSES
from jaxpaged.serve.server.sampling import completion_params, refuse_unsupported
from jaxpaged.serve.server.service import Service
from jaxpaged.serve.server.streaming import ChunkEvents, answer, finish_reason

OBJECT = "text_completion"


def completion_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=CompletionResponse, responses=GENERATION_RESPONSES)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Completes prompts, all of them together; streams with stream=true."""
        refuse_unsupported(body, service.options)
        params = completion_params(body)
        job = new_job(service, body, params, "cmpl", request.scope["state"])
        service.engine.check_available()
        service.check_params(params)
        texts, prompts = await _read_prompts(service, body)
        echo = _Echo(service, body, texts, prompts)
        chunks = _TextChunks(job, body, echo)
        return await answer(
            job, prompts, request, lambda outputs: _response(job, body, outputs, echo), chunks
        )

    return router


async def _read_prompts(
    service: Service, body: CompletionRequest
) -> tuple[Sequence[str | None], Sequence[list[int]]]:
    """Texts, where prompts are texts, and token ids of all prompts, checked."""
    prompt: Any = body.prompt
    listed: list[str | list[int]]
    listed = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    if len(listed) > service.options.max_prompts:
        limit = service.options.max_prompts
        raise RequestFailure(400, f"prompt: must be at most {limit} prompts on this server", param="prompt")
    texts = [item if isinstance(item, str) else None for item in listed]
    special = body.add_special_tokens is not False
    prompts = []
    for item in listed:
        if not item:
            raise InvalidRequestError("prompt", item, "must not be empty")
        ids = await service.encode(item, add_special_tokens=special) if isinstance(item, str) else item
        service.check_prompt_ids(ids)
        prompts.append(ids)
    return texts, prompts


class _Echo:
    """The prompts, as far as they are to be returned."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        texts: Sequence[str | None],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self.wanted = body.echo
        # With max_tokens=0 nothing but the prompt is.
        self.alone = body.echo and body.max_tokens == 0
        self._service, self._body, self._texts, self._prompts = service, body, texts, prompts

    def text(self, number: int) -> str:
        """The text of a prompt; of one that came as token ids, what they decode to."""
        if not self.wanted:
            return ""
        text = self._texts[number]
        if text is None:
            text = self._service.tokenizer.decode(self._prompts[number], skip_special_tokens=False)
        return text

    def offsets(self, number: int) -> TextOffsets:
        """Of the tokens of a choice for prompt ``number``, its own tokens first if they are returned."""
        special = self._service.special_token_ids
        # What the tokenizer adds to a text, as BOS, is no part of it; what decodes token ids shows all of them.
        shown = self.wanted and self._texts[number] is None
        hidden = special if self._body.skip_special_tokens and not shown else frozenset[int]()
        return TextOffsets(self._service.token_texts, hidden)

    def logprobs(
        self, number: int, output: RequestOutput, offsets: TextOffsets
    ) -> dict[str, list[Any]] | None:
        """Log-probabilities of a prompt's tokens."""
        count = self._body.logprobs
        if not self.wanted or count is None:
            return None
        ids, places = self._prompts[number], output.prompt_logprobs or []
        # prompt_logprobs may have asked for more candidates than logprobs did.
        narrowed = [_narrow(place, token, count) for place, token in zip(places, ids, strict=True)]
        return completion_logprobs(self._service.token_texts, ids, narrowed, offsets)

    def prompt_logprobs(self, output: RequestOutput) -> list[dict[str, Any] | None] | None:
        """vLLM's own field."""
        if self._body.prompt_logprobs is None or output.prompt_logprobs is None:
            return None
        return prompt_logprobs(self._service.token_texts, output.prompt_logprobs)


def _narrow(place: dict[int, Logprob] | None, token_id: int, count: int) -> dict[int, Logprob] | None:
    if place is None:
        return None
    return {other: found for other, found in place.items() if other == token_id or found.rank <= count}


def _joined(
    before: dict[str, list[Any]] | None, after: dict[str, list[Any]] | None
) -> dict[str, list[Any]] | None:
    if before is None or after is None:
        return before or after
    return {name: before[name] + after[name] for name in before}


def _response(
    job: Job, body: CompletionRequest, outputs: Sequence[RequestOutput], echo: _Echo
) -> CompletionResponse:
    choices = []
    for number, output in enumerate(outputs):
        prompt_text = echo.text(number)
        for completion in sorted(output.outputs, key=lambda found: found.index):
            if echo.alone:
                completion = CompletionOutput(completion.index, "", [], finish_reason="length")
            offsets = echo.offsets(number)
            prompt_part = echo.logprobs(number, output, offsets)
            found = _joined(prompt_part, _logprobs(job, body, completion, offsets))
            choices.append(
                CompletionChoice(
                    index=number * body.n + completion.index,
                    text=prompt_text + completion.text,
                    logprobs=None if found is None else CompletionLogprobs(**found),
                    finish_reason=finish_reason(completion.finish_reason),
                    stop_reason=completion.stop_reason,
                    prompt_logprobs=echo.prompt_logprobs(output),
                    token_ids=completion.token_ids if body.return_token_ids else None,
                    prompt_token_ids=output.prompt_token_ids if body.return_token_ids else None,
                )
            )
    if echo.alone:
        job.num_completion_tokens = 0
    return CompletionResponse(
        id=job.id, created=job.service.created_now(), model=job.model, choices=choices, usage=job.usage()
    )


def _logprobs(
    job: Job, body: CompletionRequest, completion: CompletionOutput, offsets: TextOffsets
) -> dict[str, list[Any]] | None:
    if body.logprobs is None or completion.logprobs is None:
        return None
    return completion_logprobs(job.service.token_texts, completion.token_ids, completion.logprobs, offsets)


class _TextChunks:
    """Outputs as chunks of completions."""

    def __init__(self, job: Job, body: CompletionRequest, echo: _Echo) -> None:
        self._job, self._body, self._echo = job, body, echo
        self._write = ChunkEvents(job, OBJECT)
        self._offsets: dict[int, TextOffsets] = {}  # of the choices that have begun
        plain = body.logprobs is None and not body.return_token_ids and not self._write.has_usage
        self._frames: dict[int, tuple[bytes, bytes]] | None = {} if plain else None

    def opening(self, number: int) -> bytes:
        """Nothing: what is echoed comes with the first output, which has its log-probabilities."""
        return b""

    def events(self, number: int, output: RequestOutput) -> bytes:
        """A chunk for each completion that has something new."""
        data = b""
        for completion in output.outputs:
            index = number * self._body.n + completion.index
            if self._frames is not None and completion.finish_reason is None and index in self._offsets:
                data += self._text_event(index, completion.text)
                continue
            choice = self._choice(number, index, output, completion)
            if choice is not None:
                data += self._write.event([choice])
        return data

    def _text_event(self, index: int, text: str) -> bytes:
        """A chunk that brings text and nothing else, as most do: only the text is written anew."""
        assert self._frames is not None, "not for such requests"
        if not text:
            return b""  # a part of a character, or text that may become a stop string
        frame = self._frames.get(index)
        if frame is None:
            place = "\0"
            before, _, after = self._write.event([TextChunkChoice(index, place)]).partition(
                self._write.encode(place)
            )
            frame = self._frames[index] = before, after
        return frame[0] + self._write.encode(text) + frame[1]

    def _choice(
        self, number: int, index: int, output: RequestOutput, completion: CompletionOutput
    ) -> TextChunkChoice | None:
        body, first = self._body, index not in self._offsets
        text, reason = completion.text, completion.finish_reason
        if self._echo.alone:
            completion, text, reason = CompletionOutput(completion.index, "", []), "", "length"
        logprobs = None
        if first:
            self._offsets[index] = self._echo.offsets(number)
            text = self._echo.text(number) + text
            logprobs = self._echo.logprobs(number, output, self._offsets[index])
        if body.logprobs is not None:
            logprobs = _joined(logprobs, _logprobs(self._job, body, completion, self._offsets[index]))
        if not (text or reason or logprobs or body.return_token_ids):
            return None  # a part of a character, or text that may become a stop string
        choice = TextChunkChoice(index, text, logprobs, finish_reason(reason), completion.stop_reason)
        if body.return_token_ids:
            choice.token_ids = completion.token_ids
            choice.prompt_token_ids = output.prompt_token_ids if first else msgspec.UNSET
        if first and (found := self._echo.prompt_logprobs(output)) is not None:
            choice.prompt_logprobs = found
        return choice

    def usage(self) -> bytes:
        """The last chunk."""
        if self._echo.alone:
            self._job.num_completion_tokens = 0
        return self._write.usage()

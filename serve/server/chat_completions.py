"""``POST /v1/chat/completions``."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jaxpaged import CompletionOutput, RequestOutput
from jaxpaged.serve.server.jobs import Job, new_job
from jaxpaged.serve.server.logprob_formats import chat_logprobs
from jaxpaged.serve.server.protocol import ChatCompletionRequest, Message
from jaxpaged.serve.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionResponse,
    ChatLogprobs,
    ChatMessage,
    ChunkDelta,
)
from jaxpaged.serve.server.route_docs import GENERATION_RESPONSES
from jaxpaged.serve.server.sampling import chat_params, refuse_unsupported
from jaxpaged.serve.server.service import Service
from jaxpaged.serve.server.streaming import ChunkEvents, answer, finish_reason

OBJECT = "chat.completion.chunk"


def chat_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions", response_model=ChatCompletionResponse, responses=GENERATION_RESPONSES
    )
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answers a conversation, written as a prompt by the chat template; streams with stream=true."""
        refuse_unsupported(body, service.options)
        params = chat_params(body)
        job = new_job(service, body, params, "chatcmpl", request.scope["state"])
        service.engine.check_available()
        service.check_params(params)
        arguments = dict(body.chat_template_kwargs or {})
        for name in ("documents", "reasoning_effort"):
            if getattr(body, name) is not None:
                arguments[name] = getattr(body, name)
        prompt = await service.render(
            plain_messages(body.messages), arguments, add_generation_prompt=body.add_generation_prompt
        )
        ids = await service.encode(prompt, add_special_tokens=body.add_special_tokens is True)
        service.check_prompt_ids(ids)
        chunks = _ChatChunks(job, body)
        return await answer(job, [ids], request, lambda outputs: _response(job, body, outputs[0]), chunks)

    return router


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: the content a string."""
    plain = []
    for message in messages:
        fields = message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            fields["content"] = "\n".join(part.text for part in message.content)
        fields.setdefault("content", "")
        plain.append(fields)
    return plain


def _response(job: Job, body: ChatCompletionRequest, output: RequestOutput) -> ChatCompletionResponse:
    choices = []
    for completion in sorted(output.outputs, key=lambda found: found.index):
        found = _logprobs(job, body, completion)
        choices.append(
            ChatChoice(
                index=completion.index,
                message=ChatMessage(content=completion.text),
                logprobs=None if found is None else ChatLogprobs(**found),
                finish_reason=finish_reason(completion.finish_reason),
                stop_reason=completion.stop_reason,
                token_ids=completion.token_ids if body.return_token_ids else None,
            )
        )
    return ChatCompletionResponse(
        id=job.id,
        created=job.service.created_now(),
        model=job.model,
        choices=choices,
        usage=job.usage(),
        prompt_token_ids=output.prompt_token_ids if body.return_token_ids else None,
    )


def _logprobs(job: Job, body: ChatCompletionRequest, completion: CompletionOutput) -> dict[str, Any] | None:
    if not body.logprobs or completion.logprobs is None:
        return None
    return chat_logprobs(
        job.service.token_texts, completion.token_ids, completion.logprobs, body.top_logprobs or 0
    )


class _ChatChunks:
    """Outputs as chunks of answers."""

    def __init__(self, job: Job, body: ChatCompletionRequest) -> None:
        self._job, self._body = job, body
        self._write = ChunkEvents(job, OBJECT)

    def opening(self, number: int) -> bytes:
        """A chunk with the role, for each answer."""
        delta = ChunkDelta(role="assistant", content="")
        return b"".join(self._write.event([ChatChunkChoice(index, delta)]) for index in range(self._body.n))

    def events(self, number: int, output: RequestOutput) -> bytes:
        """A chunk for each answer that has something new."""
        data = b""
        for completion in output.outputs:
            text, reason = completion.text, completion.finish_reason
            logprobs = _logprobs(self._job, self._body, completion)
            if not (text or reason or logprobs or self._body.return_token_ids):
                continue  # a part of a character, or text that may become a stop string
            delta = ChunkDelta(content=text) if text else ChunkDelta()
            choice = ChatChunkChoice(completion.index, delta, logprobs, finish_reason(reason))
            if reason:
                choice.stop_reason = completion.stop_reason
            if self._body.return_token_ids:
                choice.token_ids = completion.token_ids
            data += self._write.event([choice])
        return data

    def usage(self) -> bytes:
        """The last chunk."""
        return self._write.usage()

"""What answers look like: documented by pydantic models, chunks of streams as msgspec structures, which are cheaper."""

from typing import Any

import msgspec
from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion, one entry a token; None for the first token of an echoed prompt."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class CompletionResponse(BaseModel):
    """Answer of ``POST /v1/completions``."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(BaseModel):
    """A candidate; ``bytes`` are those of its text in UTF-8, or None where it has none of its own."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(TopLogprob):
    """A token with the likeliest candidates at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob] | None = None


class ChatMessage(BaseModel):
    """The model's answer."""

    role: str = "assistant"
    content: str | None = None
    refusal: str | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletionResponse(BaseModel):
    """Answer of ``POST /v1/chat/completions``."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ErrorObject(BaseModel):
    """What was wrong; ``param`` is the field of the request."""

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None


class ErrorResponse(BaseModel):
    """Answer to a request that is refused or has failed."""

    error: ErrorObject


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "jaxpaged"
    max_model_len: int | None = None


class ModelList(BaseModel):
    """Answer of ``GET /v1/models``."""

    object: str = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """Answer of ``POST /tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(BaseModel):
    """Answer of ``POST /detokenize``."""

    prompt: str


class Progress(BaseModel):
    """How far the start has come."""

    stage: str
    done: int
    total: int
    seconds: float


class HealthResponse(BaseModel):
    """Answer of ``GET /health``: "starting", "ready", "draining", "dead" or "closed"."""

    status: str
    progress: Progress | None = None
    error: str | None = None


class VersionResponse(BaseModel):
    """Answer of ``GET /version``."""

    version: str
    jax: str


# Chunks of streams. ``usage`` is left out unless it was asked for; then it is null in all but some chunks.


class ChunkUsage(msgspec.Struct):
    """As ``Usage``."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class TextChunkChoice(msgspec.Struct):
    """What is new of a completion."""

    index: int
    text: str
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: Any = msgspec.UNSET


class ChunkDelta(msgspec.Struct):
    """What is new of an answer."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType | None = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct):
    """What is new of an answer, and its end."""

    index: int
    delta: ChunkDelta
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Chunk(msgspec.Struct):
    """An event of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: ChunkUsage | msgspec.UnsetType | None = msgspec.UNSET

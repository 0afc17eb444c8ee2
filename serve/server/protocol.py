"""What requests look like: the fields of OpenAI's API that are supported, vLLM's sampling fields, and their bounds.

A field that is not listed is refused by name, so that nobody believes that it had an effect; a field of OpenAI's that
changes nothing about the text is taken and ignored (``_Ignored``); one that asks for what is not there is refused
unless it holds what is its default.
"""

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

MAX_BATCH = 1024  # prompts of one request, whatever the server's own limit is
MAX_MESSAGES = 4096
MAX_NAME_CHARS = 256

Ids = Annotated[list[int], Field(max_length=1 << 20)]
Stop = Annotated[str, Field(max_length=1024)] | Annotated[list[str], Field(max_length=64)]


class _Ignored(BaseModel):
    """Fields that clients send and that change nothing here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    user: str | None = Field(None, description="Ignored.")
    metadata: dict[str, Any] | None = Field(None, description="Ignored.")
    store: bool | None = Field(None, description="Ignored.")
    service_tier: str | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored; see cache_salt.")
    prompt_cache_retention: str | None = Field(None, description="Ignored.")


class StreamOptions(BaseModel):
    """How a stream reports usage."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="Send usage in a last chunk.")
    continuous_usage_stats: bool = Field(False, description="Send usage in every chunk.")
    include_obfuscation: bool = Field(False, description="Ignored.")


class SamplingRequest(_Ignored):
    """Fields that completions and chats have in common; those that OpenAI lacks are vLLM's ``SamplingParams``."""

    model: str | None = Field(None, description="A served model's name; None takes the one there is.")
    n: int = Field(1, ge=1, description="Completions for each prompt.")
    temperature: float | None = Field(None, ge=0, description="0 is greedy. Default: 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stop | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0)
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    allowed_token_ids: Ids | None = None
    bad_words: Annotated[list[str], Field(max_length=128)] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = Field(None, description="Add BOS and the like to the prompt's text.")
    return_token_ids: bool = Field(False, description="Also return the ids of the tokens.")
    priority: int = Field(
        0, ge=-(2**31), le=2**31, description="Smaller goes first, where the policy looks at it."
    )
    cache_salt: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = Field(
        None, description="Requests with different salts share no cached prefix."
    )
    request_id: Annotated[str, Field(max_length=128, pattern=r"^[!-~]+$")] | None = Field(
        None, description="Becomes part of the response's id."
    )

    # SamplingParams' names of the fields above that it takes as they are, where they are given.
    SAMPLING_FIELDS: ClassVar[tuple[str, ...]] = (
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "min_tokens",
        "logit_bias",
        "allowed_token_ids",
        "bad_words",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
    )

    # Fields that ask for something that is not there, and the values with which they ask for nothing.
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {}


class CompletionRequest(SamplingRequest):
    """Body of ``POST /v1/completions``."""

    prompt: (
        str
        | Annotated[list[int], Field(min_length=1, max_length=1 << 21)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_BATCH)]
        | Annotated[
            list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=MAX_BATCH)
        ]
    ) = Field(description="Text, token ids, or a list of either.")
    max_tokens: int | None = Field(16, ge=0, description="0 only together with echo.")
    logprobs: int | None = Field(None, ge=0, description="Likeliest tokens to report at each place.")
    prompt_logprobs: int | None = Field(
        None, ge=0, description="The same for the prompt's tokens, vLLM's format."
    )
    echo: bool = Field(False, description="Put the prompt before the completion, its log-probabilities too.")
    best_of: int | None = Field(None, ge=1, description="Generate more and return the n likeliest.")
    suffix: str | None = Field(None, description="Not supported: must be empty.")
    response_format: dict[str, Any] | None = Field(None, description="Not supported but for type text.")

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "suffix": (None, ""),
        "response_format": (None, {"type": "text"}),
    }


class TextPart(BaseModel):
    """A part of a message: text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: str = Field(
        pattern="^(text|input_text|output_text|refusal)$", description="Only text is supported."
    )
    text: str


class Message(BaseModel):
    """One message of a conversation; further fields go to the chat template as they are."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: str = Field(min_length=1, max_length=64)
    content: str | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: Annotated[str, Field(max_length=MAX_NAME_CHARS)] | None = None


class ChatCompletionRequest(SamplingRequest):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1, description="Default: what fits the model.")
    max_completion_tokens: int | None = Field(None, ge=1, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, description="Likeliest tokens to report; needs logprobs.")
    add_generation_prompt: bool = Field(True, description="End the prompt where the assistant begins.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="For the chat template; allow-listed."
    )
    documents: list[dict[str, Any]] | None = Field(None, description="For the chat template.")
    reasoning_effort: str | None = Field(None, description="For the chat template.")
    echo: bool = Field(False, description="Not supported: must be false.")
    continue_final_message: bool = Field(False, description="Not supported: must be false.")
    chat_template: str | None = Field(None, description="Refused: templates are the server's.")
    tools: list[Any] | None = Field(None, description="Not supported.")
    tool_choice: Any = Field(None, description="Not supported but for none and auto without tools.")
    parallel_tool_calls: bool | None = Field(None, description="Ignored: there are no tools.")
    functions: list[Any] | None = Field(None, description="Not supported.")
    function_call: Any = Field(None, description="Not supported.")
    response_format: dict[str, Any] | None = Field(None, description="Not supported but for type text.")
    modalities: list[str] | None = Field(None, description="Not supported but for text.")
    audio: Any = Field(None, description="Not supported.")
    prediction: Any = Field(None, description="Ignored.")
    verbosity: str | None = Field(None, description="Ignored.")
    web_search_options: Any = Field(None, description="Not supported.")

    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "echo": (False,),
        "continue_final_message": (False,),
        "chat_template": (None,),
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "web_search_options": (None,),
    }


class TokenizeRequest(BaseModel):
    """Body of ``POST /tokenize``: a prompt, or messages for the chat template."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Default: true for a prompt, false for messages."
    )
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """Body of ``POST /detokenize``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=1 << 20)]

"""What all routes share: the engine, the names it is served by, limits, tokenising, and what is told of requests."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpaged import SamplingParams
from jaxpaged.chat_template import ALLOWED_ARGUMENTS
from jaxpaged.errors import InvalidRequestError, PromptTooLongError
from jaxpaged.serve.async_engine import AsyncEngine
from jaxpaged.serve.server.failures import RequestFailure
from jaxpaged.serve.server.options import ServerOptions
from jaxpaged.serve.server.token_texts import TokenTexts
from jaxpaged.tokenizer import Tokenizer

# Words by which clients tell this error from others and shorten their prompt: LangChain by the first, litellm by the
# second half.
CONTEXT_LENGTH = "the prompt is too long: this model's maximum context length is %d tokens"
# A text of so many characters is tokenised in another thread: it takes longer than a few hundred microseconds.
MAX_CHARS_IN_LOOP = 4096
# No token is longer than so many characters in practice; a text far beyond is refused before it is tokenised.
MAX_CHARS_PER_TOKEN = 64


@dataclass(eq=False)
class Service:
    """The engine behind the routes, and how requests to it are checked."""

    engine: AsyncEngine
    options: ServerOptions
    names: Sequence[str]
    created: int = field(default_factory=lambda: int(time.time()))
    _token_texts: TokenTexts | None = None

    @property
    def model_name(self) -> str:
        """The name answers carry."""
        return self.names[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises RequestFailure where the checkpoint has none."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise RequestFailure(400, "this model has no tokenizer: send token ids", param="prompt")
        return tokenizer

    @property
    def token_texts(self) -> TokenTexts:
        """Texts of single tokens."""
        if self._token_texts is None:
            self._token_texts = TokenTexts(self.engine.tokenizer)
        return self._token_texts

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that texts leave out."""
        tokenizer = self.engine.tokenizer
        return frozenset() if tokenizer is None else tokenizer.special_token_ids

    def created_now(self) -> int:
        """Seconds since 1970, of an answer that is made now."""
        return int(time.time())

    def check_model(self, name: str | None) -> str:
        """The served name that a request asks for; raises RequestFailure for any other."""
        if not name:
            return self.model_name
        if name not in self.names:
            message = f"the model {name!r:.200} does not exist; served are {', '.join(self.names)}"
            raise RequestFailure(404, message, param="model", code="model_not_found")
        return name

    def check_params(self, params: SamplingParams) -> None:
        """Raises InvalidRequestError for what the model or the server's limits do not allow."""
        options, engine = self.options, self.engine
        limits: list[tuple[str, Any, int | None, int]] = [
            ("n", params.n, params.n, options.max_n),
            ("best_of", params.best_of, params.best_of, options.max_n),
            ("stop", params.stop, len(params.stop or ()), options.max_stop),  # type: ignore[arg-type]
            ("logprobs", params.logprobs, params.logprobs, options.max_logprobs),
            ("prompt_logprobs", params.prompt_logprobs, params.prompt_logprobs, options.max_logprobs),
        ]
        for name, value, size, limit in limits:
            if size is not None and size > limit:
                raise InvalidRequestError(name, value, f"must be at most {limit} on this server")
        config = engine.config
        has_tokenizer = engine.tokenizer is not None
        params.validate_for(
            engine.model_config.vocab_size, config.max_logprobs, config.max_model_len, has_tokenizer
        )

    def check_prompt_ids(self, ids: Sequence[int]) -> None:
        """Raises InvalidRequestError for a prompt that the model cannot take, or that the limits do not allow."""
        limit = self.engine.config.max_model_len
        allowed = self.options.max_prompt_tokens
        if allowed is not None and len(ids) > allowed:
            reason = f"{CONTEXT_LENGTH % allowed} on this server"
            raise PromptTooLongError("prompt", f"{len(ids)} tokens", reason)
        if len(ids) >= limit:
            reason = f"{CONTEXT_LENGTH % limit}, at least one of them for the output"
            raise PromptTooLongError("prompt", f"{len(ids)} tokens", reason)
        if not ids:
            raise InvalidRequestError("prompt", "", "must have at least one token")
        vocab_size = self.engine.model_config.vocab_size
        for wrong in (min(ids), max(ids)):
            if not 0 <= wrong < vocab_size:
                reason = f"is not a token id of this model (vocab_size={vocab_size})"
                raise InvalidRequestError("prompt", wrong, reason)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; a long one is tokenised in another thread."""
        tokenizer, limit = self.tokenizer, self.engine.config.max_model_len
        if len(text) > limit * MAX_CHARS_PER_TOKEN:
            reason = f"{CONTEXT_LENGTH % limit}, which cannot hold so many"
            raise PromptTooLongError("prompt", f"{len(text)} characters", reason)
        if len(text) <= MAX_CHARS_IN_LOOP:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def render(
        self, messages: Sequence[dict[str, Any]], arguments: dict[str, Any], *, add_generation_prompt: bool
    ) -> str:
        """The prompt of a conversation, by the chat template, in another thread."""
        for name, value in arguments.items():
            if name not in ALLOWED_ARGUMENTS:
                reason = f"is not one of {', '.join(sorted(ALLOWED_ARGUMENTS))}"
                raise InvalidRequestError(f"chat_template_kwargs.{name}", value, reason)
        return await asyncio.to_thread(
            self.tokenizer.apply_chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **arguments,
        )

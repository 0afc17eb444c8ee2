"""From what a user passes in to checked requests; nothing in the engine has changed when this raises."""

import math
import operator
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from jaxpaged.beam_generation import BeamGeneration
from jaxpaged.beam_params import BeamSearchParams
from jaxpaged.beam_search import BeamSearch
from jaxpaged.block_space import BlockSpace
from jaxpaged.config import EngineConfig
from jaxpaged.errors import InvalidRequestError, PromptTooLongError, RequestTooLargeError
from jaxpaged.generation import Generation
from jaxpaged.prefix_cache import block_hashes, group_key
from jaxpaged.request import Request
from jaxpaged.sampling_params import RequestOutputKind, SamplingParams
from jaxpaged.sampling_rows import bias_rules
from jaxpaged.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]

MAX_PRIORITY = 1 << 31
MAX_TENANT_CHARS = 256


@dataclass(frozen=True, kw_only=True)
class Handling:
    """How a request is treated beside others; nothing of it changes its tokens.

    Attributes:
      priority: smaller goes first, where the engine's policy looks at it.
      tenant: on whose behalf it comes; tenants get fair shares.
      cache_salt: requests with different salts share no cached prefix.
      deadline: seconds from now after which it ends, with what it has; finish reason "timeout".
      max_queue_time: seconds it may wait before it first runs; then it ends likewise.

    Raises InvalidRequestError naming argument and value.
    """

    priority: int = 0
    tenant: str = ""
    cache_salt: str | None = None
    deadline: float | None = None
    max_queue_time: float | None = None

    def __post_init__(self) -> None:
        value = self.priority
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_PRIORITY:
            raise InvalidRequestError("priority", value, f"must be an integer of at most {MAX_PRIORITY}")
        if not isinstance(self.tenant, str) or len(self.tenant) > MAX_TENANT_CHARS:
            raise InvalidRequestError(
                "tenant", self.tenant, f"must be a string of at most {MAX_TENANT_CHARS} characters"
            )
        _check_salt(self.cache_salt)
        for name in ("deadline", "max_queue_time"):
            check_seconds(name, getattr(self, name))


def check_seconds(name: str, value: object) -> None:
    """Raises InvalidRequestError unless this is None or a positive, finite number."""
    if value is None:
        return
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value <= 0:  # type: ignore[operator]
        raise InvalidRequestError(name, value, "must be a positive number of seconds")


_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


def is_one_prompt(prompts: object) -> bool:
    """Whether this is a single prompt rather than a sequence of prompts."""
    if isinstance(prompts, str | bytes | bytearray | Mapping):
        return True
    if hasattr(prompts, "ndim"):
        return bool(prompts.ndim == 1)
    # Nothing right begins with an integer and goes on with something else.
    return isinstance(prompts, Sequence) and bool(prompts) and _token_id(prompts[0]) is not None


def _token_id(value: Any) -> int | None:
    """The integer that a value is, numpy's included; None when it is none. True is no token id."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


class Intake:
    """Turns prompts into ``Generation`` objects.

    Args:
      config: the engine's sizes.
      vocab_size: of the model.
      eos_token_ids: tokens that end a text.
      tokenizer: None for a checkpoint without one; then prompts are token ids.
      space: the blocks: how many there are, and how many a request needs.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        space: BlockSpace,
    ) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._space = space
        self._seeds = random.Random(config.seed)

    def generation(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams,
        handling: Handling | None = None,
    ) -> Generation:
        """A new request. Raises InvalidRequestError, naming the argument and its value."""
        handling = handling or Handling()
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequestError("request_id", request_id, "must be a string that is not empty")
        if not isinstance(params, SamplingParams | BeamSearchParams):
            raise InvalidRequestError("params", params, "must be a SamplingParams or BeamSearchParams")
        text, token_ids, salt = self._read_prompt(prompt)
        if salt is not None and handling.cache_salt is None:
            handling = replace(handling, cache_salt=salt)
        if isinstance(params, BeamSearchParams):
            return self._beam_generation(request_id, text, token_ids, params, handling)
        config = self._config
        params.validate_for(
            self._vocab_size, config.max_logprobs, config.max_model_len, self._tokenizer is not None
        )
        rules = bias_rules(params, self._vocab_size, self._eos_token_ids, self._tokenizer)
        selects = params.num_completions > params.n
        run = params.clone(logprobs=0) if selects and params.logprobs is None else params
        requests = self._requests(request_id, token_ids, run, handling, params.num_completions)
        requests[0].forks = requests[1:]
        for request in requests:
            request.needs_tokens_on_host = rules is not None
            request.needs_single_steps |= rules is not None or params.output_kind is RequestOutputKind.DELTA
        for request in requests[1:]:
            request.needs_all_logits = False
        seeds = [_child_seed(params.seed or 0, request.index) for request in requests]
        return Generation(requests, text, params, seeds, self._tokenizer, rules)

    def fork(
        self,
        found: Generation,
        new_request_id: str,
        at: int | None,
        append_token_ids: Sequence[int],
        params: SamplingParams | BeamSearchParams | None,
        index: int,
    ) -> tuple[Generation, Request]:
        """A new request that branches from a live one, as ``Engine.fork`` says, and whose blocks it can share."""
        if isinstance(found, BeamGeneration):
            raise InvalidRequestError(
                "request_id", found.request_id, "is a beam search, whose beams come and go"
            )
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(found.completions):
            raise InvalidRequestError("index", index, f"must be in [0, {len(found.completions) - 1}]")
        parent = found.completions[index].request
        at = parent.num_tokens if at is None else at
        if isinstance(at, bool) or not isinstance(at, int) or not 1 <= at <= parent.num_tokens:
            raise InvalidRequestError("at", at, f"must be in [1, {parent.num_tokens}], the tokens there are")
        if isinstance(append_token_ids, str | bytes) or not isinstance(append_token_ids, Sequence):
            raise InvalidRequestError("append_token_ids", append_token_ids, "must be token ids")
        handling = Handling(priority=parent.priority, tenant=parent.tenant, cache_salt=parent.cache_salt)
        tokens = [*parent.token_ids[:at], *append_token_ids]
        return self.generation(
            new_request_id, tokens, found.params if params is None else params, handling
        ), parent

    def _beam_generation(
        self,
        request_id: str,
        text: str | None,
        token_ids: list[int],
        params: BeamSearchParams,
        handling: Handling,
    ) -> BeamGeneration:
        params.validate_for(self._vocab_size)
        search = BeamSearch(params, self._eos_token_ids, self._config.max_model_len - len(token_ids))
        needed, offered = min(search.candidates_needed, self._vocab_size), self._config.max_logprobs
        if needed > offered:
            raise InvalidRequestError(
                "beam_width",
                params.beam_width,
                f"needs the {needed} most likely tokens of each step; raise max_logprobs={offered} of the engine",
            )
        run = SamplingParams(
            temperature=0.0,
            seed=0,
            logprobs=needed,
            max_tokens=search.max_tokens,
            include_stop_str_in_output=params.include_stop_str_in_output,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        requests = self._requests(request_id, token_ids, run, handling, params.beam_width)
        for request in requests:
            request.is_beam = request.needs_tokens_on_host = True
        return BeamGeneration(requests, text, run, search, self._tokenizer)

    def _requests(
        self, request_id: str, token_ids: list[int], params: SamplingParams, handling: Handling, count: int
    ) -> list[Request]:
        max_tokens = self._check_size(token_ids, params)
        now = time.monotonic()
        return [
            Request(
                request_id,
                token_ids,
                params,
                block_size=self._config.block_size,
                max_tokens=max_tokens,
                stop_token_ids=frozenset(params.stop_token_ids or ()),
                eos_token_ids=frozenset() if params.ignore_eos else self._eos_token_ids,
                index=index,
                cache_salt=handling.cache_salt,
                num_tables=len(self._space.windows),
                priority=handling.priority,
                tenant=handling.tenant,
                deadline=None if handling.deadline is None else now + handling.deadline,
                queue_deadline=None if handling.max_queue_time is None else now + handling.max_queue_time,
            )
            for index in range(count)
        ]

    def draw_seeds(self, generation: Generation) -> None:
        """Gives seeds to a request that brings none.

        Only once it is admitted: a request that was refused must not change what the next one draws.
        """
        if generation.params.seed is None:
            seed = self._seeds.getrandbits(64)
            for index, completion in enumerate(generation.completions):
                completion.seed = _child_seed(seed, index)

    def pin(self, prompt: Prompt, pin_id: str, ttl: float | None, cache_salt: str | None) -> int:
        """Pins the full blocks of a prompt, as ``Engine.pin_prefix`` says; returns how many are in the pool."""
        space = self._space
        if not isinstance(pin_id, str) or not pin_id:
            raise InvalidRequestError("pin_id", pin_id, "must be a string that is not empty")
        check_seconds("ttl", ttl)
        if not space.enable_prefix_caching:
            raise InvalidRequestError(
                "pin_id", pin_id, "nothing can be pinned with enable_prefix_caching=False"
            )
        keys, limit = self._prefix_keys(prompt, cache_salt), space.allocator.num_usable // 2
        if not space.pins.has_room(pin_id, keys, limit):
            raise InvalidRequestError(
                "prompt", f"{len(keys)} blocks", f"all pins may take {limit} blocks, half of the pool"
            )
        return space.pins.add(pin_id, keys, None if ttl is None else time.monotonic() + ttl)

    def _prefix_keys(self, prompt: Prompt, cache_salt: str | None) -> list[bytes]:
        """Cache keys of the full blocks of a prompt, in all groups of layers."""
        _, token_ids, salt = self._read_prompt(prompt)
        salt = cache_salt if cache_salt is not None else salt
        _check_salt(salt)
        hashes = block_hashes(token_ids, self._config.block_size, salt=salt)
        return [group_key(digest, group) for digest in hashes for group in range(len(self._space.windows))]

    def _read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        """(text, token ids, cache salt)."""
        salt: str | None = None
        if isinstance(prompt, Mapping):
            for key in prompt:
                if key not in _PROMPT_KEYS:
                    raise InvalidRequestError(
                        "prompt", key, f"unknown key; known are {', '.join(_PROMPT_KEYS)}"
                    )
            salt = prompt.get("cache_salt")
            if ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise InvalidRequestError(
                    "prompt", dict(prompt), "needs either 'prompt' or 'prompt_token_ids'"
                )
            prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
            if isinstance(prompt, Mapping):
                raise InvalidRequestError("prompt", prompt, "must be text or token ids")
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError("prompt", prompt, "must not be empty")
            if self._tokenizer is None:
                raise InvalidRequestError(
                    "prompt", prompt, "this model has no tokenizer; pass prompt_token_ids"
                )
            return prompt, self._check_ids(self._tokenizer.encode(prompt)), salt
        ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if isinstance(ids, bytes | bytearray) or not isinstance(ids, Sequence):
            raise InvalidRequestError("prompt", prompt, "must be text, token ids or a mapping with either")
        return None, self._check_ids(ids), salt

    def _check_ids(self, ids: Sequence[Any]) -> list[int]:
        if len(ids) >= (limit := self._config.max_model_len):  # before each of a million ids is looked at
            raise PromptTooLongError(
                "prompt", f"{len(ids)} tokens", f"leaves no room for an output token: max_model_len={limit}"
            )
        listed = []
        for token_id in ids:
            value = _token_id(token_id)
            if value is None:
                raise InvalidRequestError("prompt_token_ids", token_id, "must be integers")
            if not 0 <= value < self._vocab_size:
                raise InvalidRequestError(
                    "prompt_token_ids",
                    value,
                    f"is not a token id of this model (vocab_size={self._vocab_size})",
                )
            listed.append(value)
        return listed

    def _check_size(self, token_ids: list[int], params: SamplingParams) -> int:
        """Tokens the request may produce: ``max_tokens``, cut at ``max_model_len``."""
        num_prompt, limit = len(token_ids), self._config.max_model_len
        if num_prompt == 0:
            raise InvalidRequestError("prompt", token_ids, "must have at least one token")
        room = limit - num_prompt
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        # The last sampled token is never computed, so it needs no slot.
        needed = self._space.peak_blocks(num_prompt + max_tokens - 1, self._config.max_num_batched_tokens)
        available = self._space.allocator.num_usable
        if needed > available:
            raise RequestTooLargeError(
                "prompt",
                f"{num_prompt} prompt + {max_tokens} output tokens",
                f"can never fit the KV pool: {needed} blocks of {self._config.block_size} tokens needed, {available} "
                "there; lower max_tokens or raise num_blocks",
            )
        return max_tokens


def eos_token_ids(configured: Iterable[int], tokenizer: Tokenizer | None) -> frozenset[int]:
    """The tokens that end a text: those of the model's configuration or, if it names none, the tokenizer's."""
    ids = set(configured)
    if not ids and tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


def _check_salt(salt: object) -> None:
    if salt is None:
        return
    if not isinstance(salt, str):
        raise InvalidRequestError("cache_salt", salt, "must be a string")
    try:
        salt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError("cache_salt", salt, f"is not valid Unicode: {error.reason}") from error


def _child_seed(seed: int, index: int) -> int:
    """Seeds of the n completions: the first is the request's own, the others are mixed (splitmix64)."""
    if index == 0:
        return seed % 2**64
    z = (seed + index * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)

"""What a request asks of sampling, stopping and text: ``SamplingParams``, with vLLM's names and defaults."""

import contextlib
import enum
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from jaxpaged.errors import InvalidRequestError

# Bounds on what one request may ask for; they keep the host work and memory of any request small.
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_CHARS = 8192  # of all stop strings of a request together
MAX_STOP_TOKEN_IDS = 128
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 20
MAX_TOKEN_COUNT = 2**31 - 1
LOGIT_BIAS_LIMIT = 100.0
MAX_TEMPERATURE = 1e6
# Below this, dividing logits by the temperature only loses precision: the request is greedy.
MIN_TEMPERATURE = 1e-5
REPETITION_PENALTY_RANGE = (1e-6, 1e6)


class RequestOutputKind(enum.Enum):
    """How much text and how many tokens each ``RequestOutput`` of a request carries."""

    CUMULATIVE = 0  # everything so far, in every output
    DELTA = 1  # only what is new
    FINAL_ONLY = 2  # one output, when the request has finished


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling, stopping and text options of one request; checked when it is built, then unchanging.

    Names, meanings and defaults are those of vLLM's class of this name.

    n: completions per prompt. best_of: None or n is off; more are generated, and the n with the highest cumulative
    log-probability are returned, best first, when all have ended.
    presence_penalty, frequency_penalty: in [-2, 2], over the output tokens.
    repetition_penalty: over prompt and output, 1 is off. temperature: 0 is greedy. top_p in (0, 1],
    top_k (0 or -1 is off), min_p in [0, 1]. seed: any 64-bit integer, None or -1 for a fresh one.
    stop: strings that end the text. stop_token_ids: tokens that end it. ignore_eos: go on after EOS.
    max_tokens: None means up to ``max_model_len``. min_tokens: no EOS or stop token before so many.
    logprobs, prompt_logprobs: candidates per token, None is off, -1 is as many as the engine allows.
    logit_bias: token id to addend in [-100, 100]. allowed_token_ids: only these may be sampled.
    bad_words: strings that must not be produced.

    Raises InvalidRequestError (a ValueError) naming the argument and its value.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Iterable[str] | None = None  # stored as a tuple
    stop_token_ids: Iterable[int] | None = None  # stored as a tuple
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Iterable[int] | None = None  # stored as a sorted tuple without repeats
    bad_words: Iterable[str] | None = None  # stored as a tuple

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_counts()
        self._check_collections()
        for name in _FLAG_FIELDS:
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(name, getattr(self, name), "must be True or False")
        kind = self.output_kind
        with contextlib.suppress(ValueError):
            self._set("output_kind", RequestOutputKind(kind) if isinstance(kind, int) else kind)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise InvalidRequestError("output_kind", kind, "must be a RequestOutputKind")
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop", self.stop, "stop strings need detokenize=True")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        self._real("presence_penalty", -2.0, 2.0)
        self._real("frequency_penalty", -2.0, 2.0)
        self._real("repetition_penalty", *REPETITION_PENALTY_RANGE)
        self._real("temperature", 0.0, MAX_TEMPERATURE)
        if self.temperature < MIN_TEMPERATURE:
            self._set("temperature", 0.0)
        self._real("top_p", 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p", self.top_p, "must be in (0, 1]")
        self._real("min_p", 0.0, 1.0)

    def _check_counts(self) -> None:
        self._integer("n", 1, MAX_N)
        self._integer("best_of", 1, MAX_N, optional=True)
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequestError("best_of", self.best_of, f"must be at least n={self.n}")
        if self.num_completions > 1 and self.best_of is not None and self.is_greedy:
            raise InvalidRequestError(
                "best_of", self.best_of, "must be 1 with temperature=0: all would be the same"
            )
        self._integer("top_k", -1, MAX_TOKEN_COUNT)
        if self.top_k == -1:
            self._set("top_k", 0)
        self._integer("seed", -(2**63), 2**64 - 1, optional=True)
        if self.seed == -1:
            self._set("seed", None)
        self._integer("max_tokens", 1, MAX_TOKEN_COUNT, optional=True)
        self._integer("min_tokens", 0, MAX_TOKEN_COUNT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                "min_tokens", self.min_tokens, f"must be at most max_tokens={self.max_tokens}"
            )
        self._integer("logprobs", -1, MAX_TOKEN_COUNT, optional=True)
        self._integer("prompt_logprobs", -1, MAX_TOKEN_COUNT, optional=True)

    def _check_collections(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._set("stop", _strings("stop", stop, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS))
        if sum(map(len, self.stop or ())) > MAX_STOP_CHARS:
            raise InvalidRequestError(
                "stop", self.stop, f"must have at most {MAX_STOP_CHARS} characters in all"
            )
        words = (self.bad_words,) if isinstance(self.bad_words, str) else self.bad_words
        self._set("bad_words", _strings("bad_words", words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        if self.allowed_token_ids is not None:
            ids = _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
            if not ids:
                raise InvalidRequestError("allowed_token_ids", ids, "must hold at least one token id")
            self._set("allowed_token_ids", tuple(sorted(set(ids))))
        if self.logit_bias is not None:
            self._set("logit_bias", _logit_bias(self.logit_bias))

    def _real(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not _is_number(value):
            raise InvalidRequestError(name, value, "must be a number")
        if not low <= value <= high:  # also false for NaN
            raise InvalidRequestError(name, value, f"must be in [{low:g}, {high:g}]")
        self._set(name, float(value))

    def _integer(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        self._set(name, _bounded_integer(name, value, low, high))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def num_completions(self) -> int:
        """Completions that are generated; ``n`` of them are returned."""
        return self.n if self.best_of is None else self.best_of

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The parameters named in ``values``; an unknown key raises InvalidRequestError naming it."""
        known = {field.name for field in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise InvalidRequestError(str(name), value, "is not a sampling parameter")
        return cls(**values)

    def clone(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked anew."""
        return replace(self, **changes)

    def validate_for(
        self, vocab_size: int, max_logprobs: int, max_model_len: int, has_tokenizer: bool
    ) -> None:
        """Check what depends on the model and engine: id ranges, top log-probabilities, need of a tokenizer.

        Raises InvalidRequestError naming the argument and the offending value.
        """
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise InvalidRequestError(
                        name, token_id, f"is not a token id of this model (vocab_size={vocab_size})"
                    )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value > max_logprobs:
                raise InvalidRequestError(name, value, f"must be at most max_logprobs={max_logprobs}")
        if self.min_tokens > max_model_len:
            raise InvalidRequestError(
                "min_tokens", self.min_tokens, f"must be at most max_model_len={max_model_len}"
            )
        if not has_tokenizer:
            for name in ("stop", "bad_words"):
                if getattr(self, name):
                    raise InvalidRequestError(
                        name, getattr(self, name), "needs a tokenizer; this engine has none"
                    )


_FLAG_FIELDS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _bounded_integer(name: str, value: Any, low: int, high: int) -> int:
    if not _is_integer(value):
        raise InvalidRequestError(name, value, "must be an integer")
    if not low <= value <= high:
        raise InvalidRequestError(name, value, f"must be in [{low}, {high}]")
    return int(value)


def _listed(name: str, values: object, limit: int) -> list[Any]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise InvalidRequestError(name, values, "must be a list")
    listed: list[Any] = []
    for value in values:  # counted while reading: an endless iterator must not fill the memory
        if len(listed) == limit:
            raise InvalidRequestError(name, values, f"must hold at most {limit} entries")
        listed.append(value)
    return listed


def _strings(name: str, values: object, limit: int, max_chars: int) -> tuple[str, ...]:
    if values is None:
        return ()
    strings = _listed(name, values, limit)
    for value in strings:
        if not isinstance(value, str):
            raise InvalidRequestError(name, value, "must be a string")
        if not 1 <= len(value) <= max_chars:
            raise InvalidRequestError(name, value, f"must have 1 to {max_chars} characters")
    return tuple(strings)


def _token_ids(name: str, values: object, limit: int) -> tuple[int, ...]:
    if values is None:
        return ()
    return tuple(_bounded_integer(name, value, 0, MAX_TOKEN_COUNT) for value in _listed(name, values, limit))


def _logit_bias(values: object) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise InvalidRequestError("logit_bias", values, "must map token ids to numbers")
    if len(values) > MAX_LOGIT_BIAS:
        raise InvalidRequestError("logit_bias", values, f"must hold at most {MAX_LOGIT_BIAS} entries")
    bias = {}
    for key, value in values.items():
        # JSON objects have string keys.
        is_digits = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10
        token_id = _bounded_integer("logit_bias", int(key) if is_digits else key, 0, MAX_TOKEN_COUNT)
        if not _is_number(value) or math.isnan(value):
            raise InvalidRequestError("logit_bias", {key: value}, "must map token ids to numbers")
        if abs(value) > LOGIT_BIAS_LIMIT:
            raise InvalidRequestError(
                "logit_bias", {key: value}, f"must be in [-{LOGIT_BIAS_LIMIT:g}, {LOGIT_BIAS_LIMIT:g}]"
            )
        bias[token_id] = float(value)
    return bias

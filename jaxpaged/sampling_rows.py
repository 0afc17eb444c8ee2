"""The host side of sampling: from ``SamplingParams`` to the arrays that ``jaxpaged.sampler`` reads.

``SamplingTable`` keeps what is constant during a request, one line per engine row, and picks the lines of a
step's rows out in one go. ``BiasRules`` works out which logits of a request are biased or banned just now, and
tells by a cheap key when that has changed and has to go to the device again.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpaged.errors import InvalidRequestError
from jaxpaged.sampler import BIAS, FILTER, LOGPROBS, PENALTY, RANDOM, TOP_LOGPROBS, SamplingBatch
from jaxpaged.sampling_params import SamplingParams
from jaxpaged.tokenizer import Tokenizer


def needs_state(params: SamplingParams) -> bool:
    """Whether the request uses its row of the sampler's state, which then must be set when it gets the row."""
    biased = params.logit_bias or params.allowed_token_ids or params.bad_words or params.min_tokens > 0
    return bool(biased) or _has_penalty(params)


def row_flags(params: SamplingParams) -> int:
    """The flags of ``jaxpaged.sampler`` that a request needs all the time, so all of them but BIAS."""
    flags = 0
    if not params.is_greedy:
        flags |= RANDOM
        if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0:
            flags |= FILTER
    if _has_penalty(params):
        flags |= PENALTY
    if params.logprobs is not None:
        flags |= LOGPROBS if params.logprobs == 0 else LOGPROBS | TOP_LOGPROBS
    return flags


class SamplingTable:
    """Sampling parameters of all engine rows, as arrays.

    Invariants: row 0, the dummy of padding, is greedy, with no flags and no state; a row that was never set or
    was cleared equals row 0.
    """

    def __init__(self, num_rows: int) -> None:
        self._floats = np.tile(np.array([0.0, 1.0, 0.0, 1.0, 0.0, 0.0], np.float32), (num_rows, 1))
        self._ints = np.zeros((num_rows, 4), np.int32)
        self._flags = np.zeros(num_rows, np.int32)
        self._state_rows = np.zeros(num_rows, np.int32)
        self.version = 0  # changes whenever a line does

    def set(self, row: int, params: SamplingParams, seed: int) -> None:
        """Give engine row ``row`` (not 0) to a request; ``seed`` is any integer, used modulo 2**64."""
        if not 0 < row < len(self._flags):
            raise ValueError(f"row={row}: must be in [1, {len(self._flags) - 1}]")
        self._floats[row] = (
            params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self.version += 1
        words = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], np.uint32)
        self._ints[row] = (params.top_k, *words.view(np.int32), 0)
        self._flags[row] = row_flags(params)
        self._state_rows[row] = row if needs_state(params) else 0

    def set_bias(self, row: int, has_bias: bool) -> None:
        """Say whether the state holds a bias for the row at present."""
        self.version += 1
        self._flags[row] = self._flags[row] | BIAS if has_bias else self._flags[row] & ~BIAS

    def clear(self, row: int) -> None:
        """Take the row back from its request."""
        self.version += 1
        for column in (self._floats, self._ints, self._flags, self._state_rows):
            column[row] = column[0]

    def batch(self, rows: np.ndarray, positions: np.ndarray) -> SamplingBatch:
        """The parameters of a step's rows, as numpy arrays.

        rows int32 [B]: engine rows, 0 for padding. positions int32 [B]: place of the sampled token in its output;
        with the seed it fixes the random numbers.
        """
        ints = self._ints[rows]
        ints[:, 3] = positions
        flags: Any = np.asarray(np.bitwise_or.reduce(self._flags[rows], initial=0), np.int32)
        return SamplingBatch(self._state_rows[rows], self._floats[rows], ints, flags)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the dummy row is as it must be and state rows are the rows themselves."""
        assert self._floats[0].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
        assert not self._ints[0].any()
        assert self._flags[0] == 0
        assert all(state_row in (0, row) for row, state_row in enumerate(self._state_rows))


@dataclass(frozen=True)
class BiasRules:
    """What changes the logits of one request from outside the model; built by ``bias_rules``.

    static float32 [V] or None: logit_bias and allowed_token_ids, and bad words of a single token, none of which
    ever change. end_ids: tokens banned until ``min_tokens`` were produced. bad_words: those of several
    tokens, whose last token is banned right after the others were produced.
    """

    vocab_size: int
    static: np.ndarray | None
    min_tokens: int
    end_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]

    def key(self, output_token_ids: Sequence[int]) -> Hashable:
        """Equal keys mean equal rows; None means that there is no bias now. Takes microseconds."""
        is_early = len(output_token_ids) < self.min_tokens
        banned = self._completing(output_token_ids) if self.bad_words else ()
        return (is_early, banned) if self.static is not None or is_early or banned else None

    def row(self, output_token_ids: Sequence[int]) -> np.ndarray | None:
        """The bias after ``output_token_ids``: float32 [V], -inf for banned tokens, or None for no bias."""
        if self.key(output_token_ids) is None:
            return None
        row = np.zeros(self.vocab_size, np.float32) if self.static is None else self.static.copy()
        banned = list(self._completing(output_token_ids))
        if len(output_token_ids) < self.min_tokens:
            banned += self.end_ids
        row[banned] = -np.inf
        if self.static is not None and not np.isfinite(row).any():
            # Everything that is allowed is banned for now: the lasting rule wins over the passing ones.
            return self.static.copy()
        return row

    def _completing(self, output_token_ids: Sequence[int]) -> tuple[int, ...]:
        """The tokens that would complete a bad word now."""
        return tuple(
            word[-1]
            for word in self.bad_words
            if len(output_token_ids) >= len(word) - 1
            and tuple(output_token_ids[1 - len(word) :]) == word[:-1]
        )


def bias_rules(
    params: SamplingParams,
    vocab_size: int,
    eos_token_ids: Iterable[int] = (),
    tokenizer: Tokenizer | None = None,
) -> BiasRules | None:
    """The rules of a request, or None when it never biases anything.

    ``params`` were checked with ``validate_for``; a tokenizer is needed for bad_words. Raises InvalidRequestError
    when no token would be left.
    """
    words = bad_word_token_ids(tokenizer, params.bad_words or ()) if tokenizer is not None else ()
    # A tokenizer may have more tokens than the model: what that cannot say needs no ban.
    words = tuple(word for word in words if max(word) < vocab_size)
    single = [word[0] for word in words if len(word) == 1]
    static = None
    if params.allowed_token_ids is not None or params.logit_bias or single:
        static = np.zeros(vocab_size, np.float32)
        if params.allowed_token_ids is not None:
            static[:] = -np.inf
            static[list(params.allowed_token_ids)] = 0.0
        for token_id, bias in (params.logit_bias or {}).items():
            static[token_id] += bias
        static[single] = -np.inf
        if not np.isfinite(static).any():
            raise InvalidRequestError(
                "allowed_token_ids", params.allowed_token_ids, "leaves no token that is not a bad word"
            )
    several = tuple(word for word in words if len(word) > 1)
    end_ids = tuple(sorted(i for i in {*eos_token_ids, *(params.stop_token_ids or ())} if i < vocab_size))
    min_tokens = params.min_tokens if end_ids else 0
    if static is None and not several and min_tokens == 0:
        return None
    return BiasRules(vocab_size, static, min_tokens, end_ids, several)


def bad_word_token_ids(tokenizer: Tokenizer, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences that spell the words, at the start of a text as well as after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            token_ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if token_ids:
                found[token_ids] = None
    return tuple(found)


def output_counts_row(output_token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """How often each token was produced: int32 [V], for ``sampler.set_row``."""
    return np.bincount(np.asarray(output_token_ids, np.int64), minlength=vocab_size).astype(np.int32)


def prompt_mask_row(prompt_token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Which tokens the prompt holds: bool [V], for ``sampler.set_row``."""
    mask = np.zeros(vocab_size, np.bool_)
    mask[np.asarray(prompt_token_ids, np.int64)] = True
    return mask


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )

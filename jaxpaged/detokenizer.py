"""The text of a request while its tokens arrive: whole characters only, and never part of a stop string."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from jaxpaged.sampling_params import SamplingParams
from jaxpaged.stop_strings import stop_strings
from jaxpaged.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# How many tokens of the prompt tell how the first new token is joined to it (a leading space or none).
_CONTEXT_TOKENS = 6
# A character has at most 4 bytes, so a text that is still broken after so many tokens will stay broken.
_MAX_PENDING_TOKENS = 16


class IncrementalDetokenizer:
    """Text of one completion, built token by token.

    What ``append`` and ``flush`` return, put together, is ``text``. It equals ``tokenizer.decode`` of all the
    tokens, cut at the first stop string. The stop string found is the one that ends first in the text, the
    longest of them if several do, so it does not depend on where tokens begin and end.

    prompt_token_ids: the prompt, for the space before the first word. ``params`` says what to skip, which
    stop strings to look for and whether they are shown; those that end within the text of the first
    ``min_tokens`` tokens are passed over. With no tokenizer, or with ``detokenize`` off, there is no text.

    Invariants: ``_held`` is the end of the text so far that may still turn out to begin a stop string; once
    a stop string was found nothing changes any more. Time is linear in the number of tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, prompt_token_ids: Sequence[int], params: SamplingParams
    ) -> None:
        self._pieces: _Pieces | None = None
        if tokenizer is not None and params.detokenize:
            self._pieces = _pieces(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = stop_strings(tuple(params.stop)) if params.stop else None
        self._include_stop = params.include_stop_str_in_output
        self._tokens_to_pass = params.min_tokens
        self._state = 0
        self._held = ""
        self._stop: str | None = None
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """Everything that ``append`` and ``flush`` returned so far."""
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def check_stop(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stop

    def append(self, token_id: int) -> str:
        """Add a token; returns the text that can be shown now. Nothing happens after a stop string."""
        if self._pieces is None or self._stop is not None:
            return ""
        piece = self._pieces.append(token_id)
        search = self._tokens_to_pass <= 0
        self._tokens_to_pass -= 1
        return self._show(piece, search) if piece else ""

    def flush(self) -> str:
        """End the text: returns what was held back, with an unfinished character as U+FFFD.

        May find a stop string in it.
        """
        if self._pieces is None or self._stop is not None:
            return ""
        shown = self._show(self._pieces.flush(), self._tokens_to_pass <= 0)
        if self._stop is None and self._held:
            shown += self._held
            self._shown.append(self._held)
            self._held = ""
        return shown

    def _show(self, piece: str, search: bool) -> str:
        shown = piece if self._stops is None else self._before_stop(piece, search)
        if shown:
            self._shown.append(shown)
        return shown

    def _before_stop(self, piece: str, search: bool) -> str:
        """What can be shown of the held text and ``piece``: all but the possible beginning of a stop string."""
        stops = self._stops
        assert stops is not None
        text = self._held + piece
        state = self._state
        for end, char in enumerate(piece, len(self._held) + 1):
            state = stops.next_state(state, char)
            if search and stops.matched[state]:
                start = end - stops.matched[state]
                self._stop = text[start:end]
                self._held = ""
                return text[: end if self._include_stop else start]
        self._state = state
        kept = len(text) - stops.pending[state]
        self._held = text[kept:]
        return text[:kept]


class _Pieces(Protocol):
    """Tokens in, whole characters out."""

    def append(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


def _pieces(tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> _Pieces:
    if tokenizer.is_byte_level:
        return _BytePieces(tokenizer, skip_special_tokens)
    return _WindowPieces(tokenizer, prompt_token_ids, skip_special_tokens)


class _BytePieces:
    """Byte-level vocabularies: every token is some bytes, which a streaming UTF-8 decoder puts together."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def append(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowPieces:
    """Any other vocabulary: decode a short window twice, without and with the new token; the rest is new.

    The text of a token may depend on the tokens before it (spaces, bytes of one character), so the window
    starts at the tokens shown last: ``_ids[:_num_shown]`` were shown, the others wait for a whole character.
    A run of byte tokens that is not valid UTF-8 is decoded by ``tokenizers`` to one U+FFFD for each byte of
    the run, valid ones included; here characters that were complete before it broke stay as they were shown.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._ids = [
            token_id for token_id in prompt_token_ids[-_CONTEXT_TOKENS:] if token_id not in self._skipped
        ]
        self._num_shown = len(self._ids)

    def append(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        return self._new_text(is_final=len(self._ids) - self._num_shown >= _MAX_PENDING_TOKENS)

    def flush(self) -> str:
        return self._new_text(is_final=True)

    def _new_text(self, is_final: bool) -> str:
        shown = self._decode(self._ids[: self._num_shown])
        text = self._decode(self._ids)
        if not is_final and (text.endswith(_REPLACEMENT) or len(text) <= len(shown)):
            return ""
        self._ids = self._ids[self._num_shown :]
        self._num_shown = len(self._ids)
        return text[len(shown) :] if text.startswith(shown) else self._decode(self._ids)

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

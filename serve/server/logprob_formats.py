"""Log-probabilities as the APIs write them: completions as parallel lists, chats as a list of tokens."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.outputs import Logprob
from jaxpaged.serve.server.token_texts import TokenTexts

# JSON has no infinity; what cannot be sampled at all is written as OpenAI writes what is not among the likeliest.
LOWEST = -9999.0

Places = Sequence[Mapping[int, Logprob] | None]  # at each place, the token there first


class TextOffsets:
    """Where tokens begin in a text, in characters, one token after the other.

    A token that is only a part of a character begins where the character does. ``hidden`` are tokens that the text
    leaves out.
    """

    def __init__(self, texts: TokenTexts, hidden: frozenset[int]) -> None:
        self._texts, self._hidden = texts, hidden
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._offset = 0

    def next(self, token_id: int) -> int:
        """Where the next token begins."""
        offset = self._offset
        if token_id not in self._hidden:
            raw = self._texts.utf8(token_id)
            self._offset += len(self._texts.text(token_id) if raw is None else self._decode(bytes(raw)))
        return offset


def completion_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], places: Places, offsets: TextOffsets
) -> dict[str, list[Any]]:
    """``CompletionLogprobs`` of the next tokens of a text."""
    found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token_id, place in zip(token_ids, places, strict=True):
        found["text_offset"].append(offsets.next(token_id))
        found["tokens"].append(texts.text(token_id))
        found["token_logprobs"].append(None if place is None else _finite(place[token_id].logprob))
        found["top_logprobs"].append(None if place is None else _top(texts, place))
    return found


def _top(texts: TokenTexts, place: Mapping[int, Logprob]) -> dict[str, float]:
    """Candidates by text, likeliest first; of two with one text the likelier stays."""
    ordered = sorted(place.items(), key=lambda item: item[1].rank)
    top: dict[str, float] = {}
    for token_id, candidate in ordered:
        top.setdefault(texts.text(token_id), _finite(candidate.logprob))
    return top


def chat_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], places: Places, num_top: int
) -> dict[str, list[dict[str, Any]]]:
    """``ChatLogprobs`` of some tokens, each with its ``num_top`` likeliest candidates."""
    content = []
    for token_id, place in zip(token_ids, places, strict=True):
        assert place is not None, "a sampled token without log-probability"
        likeliest = sorted(place.items(), key=lambda item: item[1].rank)[:num_top]
        top = [_candidate(texts, other, found) for other, found in likeliest]
        content.append({**_candidate(texts, token_id, place[token_id]), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(texts: TokenTexts, places: Places) -> list[dict[str, Any] | None]:
    """vLLM's format: at each place token id to log-probability, rank and text; None for the first."""
    return [
        None
        if place is None
        else {
            str(token_id): {
                "logprob": _finite(found.logprob),
                "rank": found.rank,
                "decoded_token": texts.text(token_id),
            }
            for token_id, found in place.items()
        }
        for place in places
    ]


def _candidate(texts: TokenTexts, token_id: int, found: Logprob) -> dict[str, Any]:
    return {"token": texts.text(token_id), "logprob": _finite(found.logprob), "bytes": texts.utf8(token_id)}


def _finite(value: float) -> float:
    return max(value, LOWEST) if value == value else LOWEST

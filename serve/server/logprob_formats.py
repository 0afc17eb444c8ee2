"""Log-probabilities as the APIs write them: completions as parallel lists, chats as a list of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.outputs import Logprob
from jaxpaged.serve.server.token_texts import TokenTexts

# JSON has no infinity; what cannot be sampled at all is written as OpenAI writes what is not among the likeliest.
LOWEST = -9999.0

Places = Sequence[Mapping[int, Logprob] | None]  # at each place, the token there first


def completion_logprobs(
    texts: TokenTexts,
    token_ids: Sequence[int],
    places: Places,
    offset: int,
    hidden: frozenset[int] = frozenset(),
) -> dict[str, list[Any]]:
    """``CompletionLogprobs`` of some tokens, the first of which begins at ``offset`` in the text.

    ``hidden`` are tokens that the text leaves out.
    """
    found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token_id, place in zip(token_ids, places, strict=True):
        text = texts.text(token_id)
        found["text_offset"].append(offset)
        found["tokens"].append(text)
        found["token_logprobs"].append(None if place is None else _finite(place[token_id].logprob))
        found["top_logprobs"].append(None if place is None else _top(texts, place))
        offset += 0 if token_id in hidden else len(text)
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

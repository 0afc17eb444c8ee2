"""What a streamed answer says, read after its end: when tokens came, which text, how many by the server's count."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxpaged.serve.bench_serve.client import Failure
from jaxpaged.serve.bench_serve.connection import Exchange

DONE = b"[DONE]"
MAX_MESSAGE = 300


@dataclass
class Answer:
    """One answer. Times are of ``time.perf_counter``, in seconds; one for each chunk that brought a token or more."""

    token_times: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None  # by the server's usage, as the next one
    completion_tokens: int | None = None
    ended: float | None = None  # when [DONE] came
    failure: Failure | None = None


def read_answer(exchange: Exchange) -> Answer:
    """Reads a whole response to a completion or a chat, good or bad."""
    if exchange.status != 200:
        return Answer(failure=Failure(f"status {exchange.status}", message_of(exchange.body)))
    if not exchange.content_type.startswith("text/event-stream"):
        kind = exchange.content_type or "of no type"
        return Answer(failure=Failure("not a stream", f"{kind}: {message_of(exchange.body)}"))
    answer = Answer()
    texts: list[str] = []
    for time, data in events(exchange.times, exchange.pieces):
        if data == DONE:
            answer.ended = time
            break
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            answer.failure = Failure("malformed stream", f"no JSON object: {_short(data)}")
            break
        if chunk.get("error") is not None:
            answer.failure = Failure("error in the stream", message_of(data))
            break
        _take(chunk, time, answer, texts)
    answer.text = "".join(texts)
    if answer.failure is None:
        answer.failure = _missing(answer)
    return answer


def _missing(answer: Answer) -> Failure | None:
    if answer.ended is None and answer.finish_reason is None:
        return Failure("broken stream", "it ended without [DONE] and without a finish reason")
    if not answer.token_times:
        return Failure("no tokens", f"finish reason {answer.finish_reason}")
    return None


def _take(chunk: dict[str, Any], time: float, answer: Answer, texts: list[str]) -> None:
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        answer.prompt_tokens = _count(usage, "prompt_tokens", answer.prompt_tokens)
        answer.completion_tokens = _count(usage, "completion_tokens", answer.completion_tokens)
    brings_token = False
    for choice in chunk.get("choices") or ():
        text, is_token = token_text(choice)
        brings_token |= is_token
        texts.append(text)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if brings_token:
        answer.token_times.append(time)


def token_text(choice: dict[str, Any]) -> tuple[str, bool]:
    """The text of one choice of a chunk, and whether it stands for a token.

    The first chunk of a chat, that only says the role, does not; nor does a last one that only has a finish reason.
    Empty text in between does: a token of which the text is not decided yet, as half of a character.
    """
    delta = choice.get("delta")
    if isinstance(delta, dict):
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        if text is None:
            text = delta.get("content")
        if delta.get("tool_calls"):
            return text or "", True
        says_role = "role" in delta
    else:
        text, says_role = choice.get("text"), False
    if not isinstance(text, str):
        return "", False
    return text, bool(text) or not (says_role or choice.get("finish_reason"))


def _count(usage: dict[str, Any], name: str, before: int | None) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else before


def events(times: Iterable[float], pieces: Iterable[bytes]) -> Iterator[tuple[float, bytes]]:
    """The data of server-sent events, each with the time of the piece that completed it.

    Pieces may be cut anywhere. Source: "Server-sent events" of the HTML standard, for lines that end with LF or CRLF;
    a last event that lacks its empty line is taken as well.
    """
    rest, data, time = b"", [], 0.0
    for time, piece in zip(times, pieces, strict=True):
        *lines, rest = (rest + piece if rest else piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield time, b"\n".join(data)
                data = []
    if rest.startswith(b"data:"):
        data.append(rest[5:].strip())
    if data:
        yield time, b"\n".join(data)


def message_of(body: bytes) -> str:
    """What an error says: the message of an OpenAI error object or its like, else the beginning of the text."""
    try:
        found = json.loads(body)
    except ValueError:
        return _short(body)
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return _short((found if isinstance(found, str) else json.dumps(found)).encode())


def _short(text: bytes) -> str:
    """One line of at most ``MAX_MESSAGE`` characters."""
    line = " ".join(text[: 4 * MAX_MESSAGE].decode("utf-8", "replace").split())
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"

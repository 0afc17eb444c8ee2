"""What the benchmark makes of streamed answers: which chunk is a token, when it came, and what is an error."""

import json
from typing import Any

import pytest

from jaxpaged.serve.bench_serve.answer import Answer, events, message_of, read_answer, token_text
from jaxpaged.serve.bench_serve.connection import Exchange
from tests.serve.fake_openai import completion_events, event

USAGE = {"prompt_tokens": 11, "completion_tokens": 4}


def exchange(pieces: list[bytes], *, status: int = 200, kind: str = "text/event-stream") -> Exchange:
    """A response whose pieces came at 1, 2, 3, ..."""
    made = Exchange(0.5)
    made.status, made.content_type = status, kind
    made.pieces, made.times = pieces, [float(at) for at in range(1, len(pieces) + 1)]
    return made


def answer(*values: object) -> Answer:
    """The answer of events that came one by one."""
    return read_answer(exchange([event(value) for value in values]))


def text(value: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": value, "finish_reason": finish}]}


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields, "finish_reason": finish}]}


def test_a_completion() -> None:
    read = answer(text("a"), text("b"), text("c", "length"), {"choices": [], "usage": USAGE}, "[DONE]")
    assert read == Answer([1.0, 2.0, 3.0], "abc", "length", 11, 4, ended=5.0)


def test_a_chat_whose_first_chunk_only_says_the_role() -> None:
    read = answer(
        delta(role="assistant", content=""), delta(content="a"), delta(content="b"), delta("stop"), "[DONE]"
    )
    assert read == Answer([2.0, 3.0], "ab", "stop", None, None, ended=5.0)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"text": "a", "finish_reason": "stop"}, ("a", True)),
        ({"text": "", "finish_reason": None}, ("", True)),  # half of a character
        ({"text": "", "finish_reason": "stop"}, ("", False)),
        ({"delta": {"role": "assistant"}}, ("", False)),
        ({"delta": {"role": "assistant", "content": None}}, ("", False)),
        ({"delta": {"role": "assistant", "content": ""}}, ("", False)),
        ({"delta": {"role": "assistant", "content": "a"}}, ("a", True)),  # every chunk of some servers
        ({"delta": {"content": ""}, "finish_reason": None}, ("", True)),
        ({"delta": {"content": ""}, "finish_reason": "stop"}, ("", False)),
        ({"delta": {}, "finish_reason": "stop"}, ("", False)),
        ({"delta": {"reasoning_content": "hm"}}, ("hm", True)),
        ({"delta": {"reasoning": "hm", "content": None}}, ("hm", True)),
        ({"delta": {"tool_calls": [{"index": 0}]}}, ("", True)),
        ({}, ("", False)),
    ],
)
def test_which_chunk_is_a_token(choice: dict[str, Any], expected: tuple[str, bool]) -> None:
    assert token_text(choice) == expected


def test_usage_in_every_chunk_and_none_at_all() -> None:
    chunks = [text("a") | {"usage": {"prompt_tokens": 3, "completion_tokens": n}} for n in (2, 4)]
    assert answer(*chunks, text("", "stop") | {"usage": None}, "[DONE]").completion_tokens == 4
    assert answer(text("a"), "[DONE]").completion_tokens is None


def test_several_choices_of_a_chunk_are_one_chunk() -> None:
    both = {"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]}
    assert answer(both, "[DONE]") == Answer([1.0], "ab", ended=2.0)


def test_the_end_is_done_or_a_finish_reason() -> None:
    assert answer(text("a"), "[DONE]", text("b")).text == "a"
    finished = answer(text("a", "stop"))
    assert (finished.failure, finished.ended) == (None, None)


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ((text("a"), text("b")), "broken stream", "without [DONE]"),
        ((), "broken stream", "without [DONE]"),
        (("[DONE]",), "no tokens", "None"),
        ((text("", "stop"), "[DONE]"), "no tokens", "stop"),
        ((text("a"), {"error": {"message": "died", "code": 500}}), "error in the stream", "died"),
        ((text("a"), "{oops"), "malformed stream", "{oops"),
        ((text("a"), "3"), "malformed stream", "3"),
    ],
)
def test_streams_that_are_no_answer(values: tuple[object, ...], kind: str, message: str) -> None:
    failure = answer(*values).failure
    assert failure is not None
    assert failure.kind == kind
    assert message in failure.message


@pytest.mark.parametrize(
    ("status", "kind", "body", "expected"),
    [
        (429, "application/json", b'{"error": {"message": "too many"}}', "status 429: too many"),
        (404, "application/json", b'{"detail": "Not Found"}', "status 404: Not Found"),
        (400, "application/json", b'{"object": "error", "message": "bad"}', "status 400: bad"),
        (422, "application/json", b'{"detail": [{"loc": ["x"]}]}', 'status 422: [{"loc": ["x"]}]'),
        (502, "text/html", b"<html>\n  <b>Bad</b>\n</html>", "status 502: <html> <b>Bad</b> </html>"),
        (500, "", b"", "status 500: "),
        (200, "application/json", b'{"choices": []}', 'not a stream: application/json: {"choices": []}'),
    ],
)
def test_responses_that_are_no_stream(status: int, kind: str, body: bytes, expected: str) -> None:
    failure = read_answer(exchange([body], status=status, kind=kind)).failure
    assert failure is not None
    assert f"{failure.kind}: {failure.message}" == expected


def test_messages_are_short_and_one_line() -> None:
    assert len(message_of(b"x " * 10_000)) == 300
    assert message_of(b"\xff\n\xfe") == "\ufffd \ufffd"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_events_cut_at_every_byte(newline: bytes) -> None:
    whole = b'event: x\ndata: {"a":\ndata:1}\nid: 3\n\n: a comment\n\n\ndata:[DONE]\n\n'.replace(
        b"\n", newline
    )
    expected = [b'{"a":\n1}', b"[DONE]"]
    first = whole.index(newline + newline) + 2 * len(newline)
    for cut in range(1, len(whole)):
        found = list(events([1.0, 2.0], [whole[:cut], whole[cut:]]))
        assert [data for _, data in found] == expected
        # An event came when its empty line had come.
        assert [time for time, _ in found] == [1.0 if cut >= first else 2.0, 2.0]
    bytes_of_it = [whole[at : at + 1] for at in range(len(whole))]
    assert [data for _, data in events(list(map(float, range(len(whole)))), bytes_of_it)] == expected


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_last_event_without_its_empty_line(end: bytes) -> None:
    assert list(events([1.0], [b"data: 1\n\ndata: [DONE]" + end])) == [(1.0, b"1"), (1.0, b"[DONE]")]


def test_a_whole_stream_in_one_piece_has_one_time() -> None:
    read = read_answer(exchange([b"".join(completion_events(3, chat=True, usage=USAGE))]))
    assert read.token_times == [1.0, 1.0, 1.0]
    assert (read.completion_tokens, read.prompt_tokens) == (4, 11)
    assert json.dumps(read.text) == '"t0 t1 t2 "'

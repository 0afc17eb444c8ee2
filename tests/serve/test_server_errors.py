"""What is wrong with a request is answered by its status and an OpenAI error object that names the field."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serve.live_server import LiveServer, live_server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = [{"role": "user", "content": "the cat"}]
IMAGE = {"type": "image_url", "image_url": {"url": "http://localhost/"}}
SURROGATE = "\ud800"


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


WRONG = [
    ({"prompt": None}, "prompt"),
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [384]}, "prompt"),
    ({"prompt": [2**80]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [5] * 128}, "prompt"),
    ({"prompt": "x " * 100_000}, "prompt"),
    ({"prompt": SURROGATE}, "text"),
    ({"prompt": ["a"] * 300}, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 2**70}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": 33}, "n"),
    ({"prompt": "a", "n": 10**9}, "n"),
    ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
    ({"prompt": "a", "best_of": 3, "stream": True}, "best_of"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "temperature": 1e300}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "top_k": -2}, "top_k"),
    ({"prompt": "a", "min_p": 2}, "min_p"),
    ({"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "a", "seed": 2**64}, "seed"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt": "a", "stop": [""]}, "stop"),
    ({"prompt": "a", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "a", "stop": "x" * 2000}, "stop"),
    ({"prompt": "a", "stop_token_ids": [384]}, "stop_token_ids"),
    ({"prompt": "a", "stop_token_ids": list(range(200))}, "stop_token_ids"),
    ({"prompt": "a", "logit_bias": {"384": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias"),
    ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
    ({"prompt": "a", "allowed_token_ids": []}, "allowed_token_ids"),
    ({"prompt": "a", "allowed_token_ids": [400]}, "allowed_token_ids"),
    ({"prompt": "a", "bad_words": [""]}, "bad_words"),
    ({"prompt": "a", "bad_words": ["x" * 300]}, "bad_words"),
    ({"prompt": "a", "min_tokens": 50, "max_tokens": 5}, "min_tokens"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options"),
    ({"prompt": "a", "priority": 2**40}, "priority"),
    ({"prompt": "a", "priority": -1}, "priority"),
    ({"prompt": "a", "cache_salt": "x" * 1000}, "cache_salt"),
    ({"prompt": "a", "cache_salt": SURROGATE}, "cache_salt"),
    ({"prompt": "a", "request_id": "a b"}, "request_id"),
    ({"prompt": "a", "guided_json": {}}, "guided_json"),
    ({"prompt": "a", SURROGATE: 1}, None),
]


@pytest.mark.parametrize(
    ("fields", "named"), WRONG, ids=[f"{i}-{named}" for i, (_, named) in enumerate(WRONG)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_completions_are_named(
    live: LiveServer, fields: dict[str, Any], named: str | None, stream: bool
) -> None:
    body = json.dumps({"stream": stream, **fields}).encode()
    response = live.client.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    if named is not None:
        assert named in (error["param"] or error["message"]).split(".")
    assert len(error["message"]) < 400


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
        ({"messages": [{"role": "user", "content": SURROGATE}]}, "text"),
        ({"messages": [{"role": "user", "content": "x " * 200}]}, "prompt"),
        ({"messages": ASK, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": ASK, "tool_choice": "required"}, "tool_choice"),
        ({"messages": ASK, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": ASK, "chat_template": "{{ 7 * 7 }}"}, "chat_template"),
        ({"messages": ASK, "chat_template_kwargs": {"messages": 1}}, "messages"),
        ({"messages": ASK, "chat_template_kwargs": {"__class__": 1}}, "__class__"),
        ({"messages": ASK, "modalities": ["audio"]}, "modalities"),
        ({"messages": ASK, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": ASK, "logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"messages": ASK, "max_tokens": 0}, "max_tokens"),
        ({"messages": ASK, "prompt": "x"}, "prompt"),
    ],
)  # fmt: skip
def test_wrong_chats_are_named(live: LiveServer, fields: dict[str, Any], named: str) -> None:
    body = json.dumps(fields).encode()
    response = live.client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert named in str(error_of(response, 400)["param"]).split(".")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"x"', b"{'a': 1}", b"\xff\xfe", b'{"prompt": "a"', b"\x00" * 100),
        *(b"[" * 100_000, b'{"a":' * 50_000, b'{"prompt": [1' + b"9" * 5000 + b"]}"),
        *(b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}'),
        b'{"prompt": "a", "top_p": Infinity}',
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_garbage_bodies(live: LiveServer, path: str, body: bytes) -> None:
    response = live.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert error_of(response, 400)["type"] == "invalid_request_error"


def test_unknown_things(live: LiveServer) -> None:
    wrong = live.post(COMPLETIONS, prompt="a", model="gpt-4")
    assert error_of(wrong, 404)["code"] == "model_not_found"
    assert error_of(live.client.get("/v2/nothing"), 404)["type"] == "not_found_error"
    assert error_of(live.client.get(COMPLETIONS), 405)
    assert error_of(live.client.post(COMPLETIONS, content=b"a", headers={"Content-Type": "text/plain"}), 415)
    usage = {"include_usage": True}
    assert (
        error_of(live.post(COMPLETIONS, prompt="a", stream_options=usage), 400)["param"] == "stream_options"
    )
    assert error_of(live.post("/tokenize"), 400)["param"] == "prompt"
    assert error_of(live.post("/detokenize", tokens=[400]), 400)["param"] == "tokens"


def test_one_wrong_prompt_of_several_lets_none_begin(live: LiveServer) -> None:
    before = live.stats().num_prompt_tokens
    error_of(live.post(COMPLETIONS, prompt=[[5, 6], [7, 999]], max_tokens=4), 400)
    assert live.stats().num_prompt_tokens == before


def test_what_the_pool_can_never_hold(live: LiveServer) -> None:
    """It is the engine that knows; the answer is the same."""
    many = live.post(COMPLETIONS, prompt=[5] * 100, max_tokens=20, n=20, temperature=1, ignore_eos=True)
    assert many.status_code == 200  # one after the other


@pytest.fixture(scope="module")
def limited() -> Iterator[LiveServer]:
    with live_server(
        api_key=["sk-one", "schlüssel"],
        max_n=2,
        max_prompt_tokens=10,
        max_body_bytes=10_000,
        allowed_origin=["https://app.example"],
    ) as live:
        yield live


def test_keys(limited: LiveServer) -> None:
    client, body = limited.client, {"prompt": [5], "max_tokens": 1}
    for headers in ({}, {"Authorization": "Bearer sk-two"}, {"Authorization": "sk-one"}):
        response = client.post(COMPLETIONS, json=body, headers=headers)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/page/events"):
        assert client.get(path).status_code == 401, path
    assert client.get("/health").status_code == client.get("/").status_code == 200
    for key in ("sk-one", "schlüssel"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert client.post(COMPLETIONS, json=body, headers=headers).status_code == 200
    limited.settle()


def test_keys_share_no_cached_prefix(limited: LiveServer) -> None:
    """How soon an answer begins must not tell what somebody else has asked."""

    def cached(key: str, **fields: Any) -> int:
        body = {"prompt": [7] * 9, "max_tokens": 1, **fields}
        headers = {"Authorization": f"Bearer {key}".encode()}
        response = limited.client.post(COMPLETIONS, json=body, headers=headers)
        found: int = response.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found

    assert [cached("sk-one"), cached("sk-one")] == [0, 8]
    assert [cached("schlüssel"), cached("schlüssel")] == [0, 8]
    assert cached("schlüssel", cache_salt="key-1/") == 0


def test_limits_of_a_server(limited: LiveServer) -> None:
    headers = {"Authorization": "Bearer sk-one"}

    def error(status: int, **fields: Any) -> dict[str, Any]:
        return error_of(limited.client.post(COMPLETIONS, json=fields, headers=headers), status)

    assert error(400, prompt=[5], n=3)["param"] == "n"
    assert error(400, prompt=[5] * 11)["code"] == "context_length_exceeded"
    assert error(413, prompt="x" * 20_000)


def test_pages_of_other_origins(limited: LiveServer) -> None:
    def ask(origin: str) -> httpx.Response:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return limited.client.options(COMPLETIONS, headers=headers)

    assert ask("https://app.example").headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in ask("https://evil.example").headers
    rebound = limited.client.get("/health", headers={"Host": "evil.example"})
    assert error_of(rebound, 403)

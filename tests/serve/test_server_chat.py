"""``/v1/chat/completions``, ``/v1/models``, ``/tokenize``, ``/detokenize``, ``/health``, ``/version``, ``/metrics``."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.live_server import CHAT_TEMPLATE, LiveServer

ASK: list[dict[str, Any]] = [{"role": "user", "content": "the cat"}]
WRITTEN = "[user] the cat\n[assistant] "


def test_an_answer_continues_what_the_template_writes(live: LiveServer) -> None:
    asked = live.post("/v1/chat/completions", messages=ASK, temperature=0, max_tokens=10).json()
    tokens = live.post("/tokenize", messages=ASK).json()["tokens"]
    assert live.post("/detokenize", tokens=tokens).json()["prompt"] == WRITTEN
    (expected,) = live.offline([tokens], max_tokens=10)
    (choice,) = asked["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.outputs[0].text, "refusal": None}
    assert choice["finish_reason"] == expected.outputs[0].finish_reason
    assert asked["object"] == "chat.completion"
    assert asked["usage"]["prompt_tokens"] == len(tokens)


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_the_same(live: LiveServer, n: int) -> None:
    fields: dict[str, Any] = {"messages": ASK, "seed": 4, "max_completion_tokens": 10, "n": n}
    fields |= {"logprobs": True, "top_logprobs": 2}
    whole = live.post("/v1/chat/completions", **fields).json()
    events = live.events("/v1/chat/completions", **fields)
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    for choice in whole["choices"]:
        parts = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        found = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert found == choice["logprobs"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_logprobs_of_an_answer(live: LiveServer) -> None:
    fields: dict[str, Any] = {"messages": ASK, "temperature": 0, "max_tokens": 5, "logprobs": True}
    content = live.post("/v1/chat/completions", **fields, top_logprobs=3).json()["choices"][0]["logprobs"][
        "content"
    ]
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        best = entry["top_logprobs"][0]
        assert (best["token"], best["logprob"]) == (entry["token"], entry["logprob"])
        if not entry["token"].startswith("bytes:"):
            assert bytes(entry["bytes"]).decode() == entry["token"]
    plain = live.post("/v1/chat/completions", **fields).json()["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in plain)


def test_messages_of_several_parts(live: LiveServer) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]
    tokens = live.post("/tokenize", messages=[{"role": "user", "content": parts}]).json()["tokens"]
    assert live.post("/detokenize", tokens=tokens).json()["prompt"] == WRITTEN.replace("the cat", "the\ncat")


def test_models(live: LiveServer) -> None:
    listed = live.client.get("/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["tiny", "alias"]
    assert listed["data"][0]["max_model_len"] == 128
    assert live.client.get("/v1/models/alias").json()["id"] == "alias"
    assert live.client.get("/v1/models/other").status_code == 404
    assert live.complete([5], max_tokens=1, model="alias")["model"] == "alias"


def test_tokenizing(live: LiveServer) -> None:
    found = live.post("/tokenize", prompt="the cat", return_token_strs=True).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["token_strs"][0] == "<s>"
    bare = live.post("/tokenize", prompt="the cat", add_special_tokens=False).json()
    assert bare["tokens"] == found["tokens"][1:]
    assert live.post("/detokenize", tokens=bare["tokens"]).json() == {"prompt": "the cat"}


def test_state(live: LiveServer) -> None:
    assert live.client.get("/health").json() == {"status": "ready"}
    assert set(live.client.get("/version").json()) == {"version", "jax"}
    live.complete("the cat", max_tokens=3)
    families = {f.name: f for f in text_string_to_metric_families(live.client.get("/metrics").text)}
    assert families["jaxpaged:generation_tokens"].samples[0].value >= 3
    routes = {s.labels["route"] for s in families["jaxpaged:http_requests"].samples}
    assert {"/v1/completions", "/health"} <= routes


def test_the_page_is_there(live: LiveServer) -> None:
    assert "<html" in live.client.get("/").text
    assert CHAT_TEMPLATE not in live.client.get("/").text

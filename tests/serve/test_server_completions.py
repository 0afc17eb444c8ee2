"""``/v1/completions`` says what the engine says, in OpenAI's format, whole and as a stream."""

from typing import Any

import pytest

from tests.serve.live_server import LiveServer

PROMPT = "the cat sat on"
IDS = [40, 50, 60, 70, 80]


def joined(events: list[Any], index: int = 0) -> str:
    """The text of a choice, put together."""
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


def test_an_answer_is_the_engines(live: LiveServer) -> None:
    (expected,) = live.offline(PROMPT, max_tokens=12)
    answer = live.complete(PROMPT, max_tokens=12)
    (choice,) = answer["choices"]
    assert choice["text"] == expected.outputs[0].text
    assert choice["finish_reason"] == expected.outputs[0].finish_reason
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    num_prompt, num_output = len(expected.prompt_token_ids), len(expected.outputs[0].token_ids)
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == num_output
    assert answer["usage"]["total_tokens"] == num_prompt + num_output


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"stop": ["a"]}, {"logprobs": 2}, {"max_tokens": 1}])
def test_a_stream_says_the_same(live: LiveServer, options: dict[str, Any]) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, "seed": 7, **options}
    whole = live.post("/v1/completions", **fields).json()
    events = live.events("/v1/completions", **fields)
    assert len({event["id"] for event in events}) == 1
    for choice in whole["choices"]:
        assert joined(events, choice["index"]) == choice["text"]
        parts = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        if "logprobs" in options:
            for name in ("tokens", "token_logprobs", "text_offset"):
                assert [x for part in parts for x in part["logprobs"][name]] == choice["logprobs"][name]


def test_usage_in_streams(live: LiveServer) -> None:
    fields: dict[str, Any] = {"prompt": IDS, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    assert all("usage" not in event for event in live.events("/v1/completions", **fields))
    *events, last = live.events("/v1/completions", **fields, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (5, 6)
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        event["usage"]["completion_tokens"]
        for event in live.events("/v1/completions", **fields, stream_options=options)
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 6


def test_several_prompts_and_choices(live: LiveServer) -> None:
    prompts = [PROMPT, "print('a", "def main"]
    fields: dict[str, Any] = {"max_tokens": 8, "temperature": 0.8, "seed": 3, "n": 2}
    answer = live.complete(prompts, **fields)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for number, prompt in enumerate(prompts):
        texts = [c["text"] for c in live.complete(prompt, **fields)["choices"]]
        assert [c["text"] for c in answer["choices"][2 * number : 2 * number + 2]] == texts
    events = live.events("/v1/completions", prompt=prompts, **fields)
    assert [joined(events, index) for index in range(6)] == [c["text"] for c in answer["choices"]]
    as_ids = live.complete([[40, 41], [50]], max_tokens=3, return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in as_ids["choices"]] == [[40, 41], [50]]
    assert all(len(choice["token_ids"]) <= 3 for choice in as_ids["choices"])


def test_echo_and_the_scores_of_a_prompt(live: LiveServer) -> None:
    (expected,) = live.offline([IDS], max_tokens=1, prompt_logprobs=2, logprobs=2)
    answer = live.complete(IDS, max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer["choices"]
    found = choice["logprobs"]
    assert answer["usage"]["completion_tokens"] == 0
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(IDS)
    assert found["token_logprobs"][0] is None
    for token, place, score in zip(
        IDS[1:], expected.prompt_logprobs[1:], found["token_logprobs"][1:], strict=True
    ):
        assert score == pytest.approx(place[token].logprob, abs=1e-5)
    with_output = live.complete(IDS, max_tokens=3, echo=True, logprobs=1)["choices"][0]
    text, tokens, offsets = (
        with_output["text"],
        with_output["logprobs"]["tokens"],
        with_output["logprobs"]["text_offset"],
    )
    assert len(tokens) == len(IDS) + 3
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token
    streamed = live.events("/v1/completions", prompt=IDS, max_tokens=3, temperature=0, echo=True, logprobs=1)
    assert joined(streamed) == text
    assert [o for e in streamed for o in e["choices"][0]["logprobs"]["text_offset"]] == offsets


def test_what_a_tokenizer_adds_takes_no_room_in_the_text(live: LiveServer) -> None:
    choice = live.complete("the cat", max_tokens=2, echo=True, logprobs=0)["choices"][0]
    assert choice["text"].startswith("the cat")
    assert choice["logprobs"]["tokens"][0] == "<s>"
    assert choice["logprobs"]["text_offset"][:2] == [0, 0]
    bare = live.complete("the cat", max_tokens=2, echo=True, logprobs=0, add_special_tokens=False)["choices"][
        0
    ]
    assert bare["logprobs"]["tokens"][0] != "<s>"


def test_logprobs_name_each_candidate_once(live: LiveServer) -> None:
    found = live.complete(IDS, max_tokens=8, logprobs=4)["choices"][0]["logprobs"]
    for token, score, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert top[token] == score
        assert list(top.values()) == sorted(top.values(), reverse=True)
        assert len(top) <= 5


def test_prompt_logprobs_in_vllms_format(live: LiveServer) -> None:
    choice = live.complete(IDS, max_tokens=1, prompt_logprobs=1)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert all(
        str(token) in place for token, place in zip(IDS[1:], choice["prompt_logprobs"][1:], strict=True)
    )


def test_sampling_fields_have_their_effect(live: LiveServer) -> None:
    only = live.complete(IDS, max_tokens=4, allowed_token_ids=[97], return_token_ids=True)
    assert only["choices"][0]["token_ids"] == [97] * 4
    biased = live.complete(IDS, max_tokens=3, logit_bias={"98": 100}, return_token_ids=True)
    assert biased["choices"][0]["token_ids"] == [98] * 3
    stopped = live.complete(IDS, max_tokens=9, logit_bias={"98": 100}, stop_token_ids=[98])
    assert (stopped["choices"][0]["finish_reason"], stopped["choices"][0]["stop_reason"]) == ("stop", 98)
    seeded = [live.complete(IDS, temperature=1, seed=5, max_tokens=6)["choices"][0]["text"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    best = live.complete(IDS, temperature=1, n=1, best_of=3, max_tokens=4, seed=1)
    assert len(best["choices"]) == 1


def test_cached_prompts_are_told(live: LiveServer) -> None:
    prompt = list(range(60, 90))
    live.complete(prompt, max_tokens=1)
    cached = live.complete(prompt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= 20
    salted = live.complete(prompt, max_tokens=1, cache_salt="mine")["usage"]["prompt_tokens_details"]
    assert salted["cached_tokens"] == 0


def test_ids_in_and_out(live: LiveServer) -> None:
    headers = {"X-Request-Id": "my-id-1"}
    body = {"prompt": IDS, "max_tokens": 1}
    response = live.client.post("/v1/completions", json=body, headers=headers)
    assert (response.headers["x-request-id"], response.json()["id"]) == ("my-id-1", "cmpl-my-id-1")
    assert live.post("/v1/completions", **body, request_id="body-id").json()["id"] == "cmpl-body-id"
    made = live.post("/v1/completions", **body)
    assert made.json()["id"] == f"cmpl-{made.headers['x-request-id']}"

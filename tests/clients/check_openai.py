"""openai-python: sync and async, whole and streamed, log-probabilities, n, errors as its classes."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.clients.served import PROMPT, Served, wait_until

MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.api, api_key=served.key, max_retries=0, timeout=60) as client:
        yield client


def text_of(client: openai.OpenAI, served: Served, **fields: Any) -> str:
    answer = client.completions.create(model=served.model, prompt=PROMPT, **GREEDY | fields)
    return answer.choices[0].text


def check_the_model_is_listed(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == [served.model]
    assert client.models.retrieve(served.model).id == served.model


def check_completion(client: openai.OpenAI, served: Served) -> None:
    answer = client.completions.create(model=served.model, prompt=PROMPT, **GREEDY)
    [choice] = answer.choices
    assert choice.text
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def check_prompts_of_all_kinds(client: openai.OpenAI, served: Served) -> None:
    texts = client.completions.create(model=served.model, prompt=[PROMPT, "import os\n"], **GREEDY)
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert texts.choices[0].text == text_of(client, served)
    ids = client.completions.create(model=served.model, prompt=[5, 6, 7], **GREEDY)
    both = client.completions.create(model=served.model, prompt=[[5, 6, 7], [8, 9]], **GREEDY)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == ids.choices[0].text


def check_streamed_completion_is_the_whole_one(client: openai.OpenAI, served: Served) -> None:
    options: Any = {"include_usage": True}
    stream = client.completions.create(
        model=served.model, prompt=PROMPT, stream=True, stream_options=options, **GREEDY
    )
    chunks = list(stream)
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert len(pieces) > 3
    assert "".join(piece.text for piece in pieces) == text_of(client, served)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def check_completion_logprobs(client: openai.OpenAI, served: Served) -> None:
    answer = client.completions.create(model=served.model, prompt=PROMPT, logprobs=3, echo=True, **GREEDY)
    found = answer.choices[0].logprobs
    assert found is not None
    assert answer.usage is not None
    assert found.token_logprobs is not None
    assert found.tokens is not None
    assert found.text_offset is not None
    assert found.top_logprobs is not None
    assert len(found.tokens) == len(found.token_logprobs) == answer.usage.total_tokens
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    text = answer.choices[0].text
    assert text.startswith(PROMPT)
    for token, offset in list(zip(found.tokens, found.text_offset, strict=True))[1:]:
        assert text[offset:].startswith(token)
    # Greedy: what was written is the likeliest.
    for token, top in list(zip(found.tokens, found.top_logprobs, strict=True))[-12:]:
        assert max(top, key=top.__getitem__) == token
        assert len(top) == 3


def check_several_completions(client: openai.OpenAI, served: Served) -> None:
    fields: dict[str, Any] = {"model": served.model, "prompt": PROMPT, "max_tokens": 12, "seed": 7, "n": 3}
    answer = client.completions.create(temperature=1.0, **fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) > 1
    again = client.completions.create(temperature=1.0, **fields)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    best = client.completions.create(temperature=1.0, best_of=4, **fields | {"n": 1})
    assert len(best.choices) == 1
    streamed = dict.fromkeys(range(3), "")
    for chunk in client.completions.create(temperature=1.0, stream=True, **fields):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert list(streamed.values()) == [choice.text for choice in answer.choices]


def check_stop(client: openai.OpenAI, served: Served) -> None:
    whole = text_of(client, served)
    stop = whole[3:6]
    answer = client.completions.create(model=served.model, prompt=PROMPT, stop=[stop], **GREEDY)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def check_chat(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(
        model=served.model, messages=MESSAGES, logprobs=True, top_logprobs=2, n=2, **GREEDY
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.message.role == "assistant"
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 12
        # Bytes, because a token may be a part of a character.
        written = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert written.decode() == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert choice.logprobs.content[0].top_logprobs[0].token == choice.logprobs.content[0].token


def check_streamed_chat_is_the_whole_one(client: openai.OpenAI, served: Served) -> None:
    # Ended by a stop string: the client's own accumulator of streams refuses a text that was cut off.
    fields: dict[str, Any] = {"model": served.model, "messages": MESSAGES, **GREEDY}
    fields["stop"] = text_of(client, served)[-5:]
    whole = client.chat.completions.create(**fields)
    with client.chat.completions.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content == "".join(deltas)
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    with (
        pytest.raises(openai.LengthFinishReasonError),
        client.chat.completions.stream(**fields | {"stop": None}) as stream,
    ):
        stream.get_final_completion()


def check_messages_of_parts(client: openai.OpenAI, served: Served) -> None:
    parts: list[Any] = [
        {"role": "system", "content": "import os\n"},
        {"role": "user", "content": [{"type": "text", "text": PROMPT}], "name": "somebody"},
    ]
    answer = client.chat.completions.create(
        model=served.model, messages=parts, max_completion_tokens=4, temperature=0, user="u", store=False
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def check_answers_fit_the_types_of_the_client(client: openai.OpenAI, served: Served) -> None:
    """The client itself takes whatever comes; its models, asked to, do not."""
    fields: dict[str, Any] = {"model": served.model, "messages": MESSAGES, **GREEDY, "logprobs": True}
    chat = client.chat.completions.with_raw_response.create(**fields, top_logprobs=2)
    assert ChatCompletion.model_validate_json(chat.text).object == "chat.completion"
    # Not with echo: the first token has no log-probability, with OpenAI neither, and the type lacks that.
    text = client.completions.with_raw_response.create(
        model=served.model, prompt=PROMPT, logprobs=2, **GREEDY
    )
    assert Completion.model_validate_json(text.content).object == "text_completion"
    assert Model.model_validate(client.models.list().data[0].model_dump(exclude_unset=True)).id
    for chunk in client.chat.completions.create(**fields, stream=True):
        found = ChatCompletionChunk.model_validate(chunk.model_dump(exclude_unset=True))
        assert found.object == "chat.completion.chunk"


def check_sampling_fields_of_vllm(client: openai.OpenAI, served: Served) -> None:
    extra = {"top_k": 1, "min_tokens": 4, "ignore_eos": True, "return_token_ids": True}
    answer = client.completions.create(
        model=served.model, prompt=PROMPT, max_tokens=12, extra_body=extra, logit_bias={"7": -100}
    )
    assert answer.choices[0].text == text_of(client, served)
    assert len((answer.choices[0].model_extra or {})["token_ids"]) == 12


def check_request_ids(client: openai.OpenAI, served: Served) -> None:
    raw = client.completions.with_raw_response.create(
        model=served.model, prompt=PROMPT, extra_headers={"X-Request-Id": "mine-1"}, **GREEDY
    )
    assert raw.request_id == raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().id == "cmpl-mine-1"
    own = client.chat.completions.create(model=served.model, messages=MESSAGES, max_tokens=1)
    assert own._request_id
    assert own._request_id in own.id


REFUSED: list[tuple[type[openai.APIStatusError], str, dict[str, Any]]] = [
    (openai.BadRequestError, "temperature", {"temperature": -1}),
    (openai.BadRequestError, "max_tokens", {"max_tokens": 0}),
    (openai.BadRequestError, "logprobs", {"logprobs": 100}),
    (openai.BadRequestError, "n", {"n": 1000}),
    (openai.BadRequestError, "suffix", {"suffix": "}"}),
    (openai.BadRequestError, "top_z", {"extra_body": {"top_z": 1}}),
    (openai.BadRequestError, "prompt", {"prompt": [10**6]}),
    (openai.BadRequestError, "prompt", {"prompt": [5] * 5000}),
    (openai.NotFoundError, "model", {"model": "no-such-model"}),
]


@pytest.mark.parametrize(("kind", "param", "fields"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def check_a_refusal_names_the_field(
    client: openai.OpenAI,
    served: Served,
    kind: type[openai.APIStatusError],
    param: str,
    fields: dict[str, Any],
    stream: bool,
) -> None:
    given: dict[str, Any] = {"model": served.model, "prompt": PROMPT, "stream": stream} | fields
    with pytest.raises(kind) as caught:
        client.completions.create(**given)
    assert caught.value.param == param
    assert caught.value.request_id
    assert param in caught.value.message
    assert caught.value.type


def check_too_long_a_conversation_has_its_code(client: openai.OpenAI, served: Served) -> None:
    long: Any = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=served.model, messages=long)
    assert caught.value.code == "context_length_exceeded"


def check_a_wrong_key_is_refused(client: openai.OpenAI) -> None:
    for call in (lambda c: c.models.list(), lambda c: c.completions.create(model="m", prompt="x")):
        with pytest.raises(openai.AuthenticationError) as caught:
            call(client.with_options(api_key="wrong"))
        assert caught.value.code == "invalid_api_key"


def check_what_is_not_there_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="embedded", input="x")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no-such-model")


def check_a_full_queue_is_a_rate_limit(client: openai.OpenAI, served: Served) -> None:
    prompts = [PROMPT] * served.capacity
    running = client.completions.create(
        model=served.model, prompt=PROMPT, max_tokens=400, extra_body={"ignore_eos": True}, stream=True
    )
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=served.model, prompt=prompts, max_tokens=1)
    running.close()
    assert int(caught.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=served.model, prompt=[*prompts, PROMPT], max_tokens=1)
    served.wait_until_idle()


def check_a_client_that_gives_up_costs_no_more(client: openai.OpenAI, served: Served) -> None:
    served.wait_until_idle()
    before = served.metrics()["client_disconnects_total"]
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model=served.model, prompt=PROMPT, max_tokens=400, extra_body={"ignore_eos": True}
        )
    stream = client.completions.create(
        model=served.model, prompt=PROMPT, max_tokens=400, extra_body={"ignore_eos": True}, stream=True
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: served.metrics()["client_disconnects_total"] == before + 2)
    served.wait_until_idle()


def check_async(served: Served) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=served.api, api_key=served.key, max_retries=0) as client:

            async def streamed(number: int) -> str:
                stream = await client.completions.create(
                    model=served.model, prompt=f"import os  # {number}\n", stream=True, **GREEDY
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            async def whole(number: int) -> str:
                answer = await client.completions.create(
                    model=served.model, prompt=f"import os  # {number}\n", **GREEDY
                )
                return answer.choices[0].text

            texts = await asyncio.gather(*map(streamed, range(16)))
            assert texts == await asyncio.gather(*map(whole, range(16)))
            chat = await client.chat.completions.create(model=served.model, messages=MESSAGES, **GREEDY)
            assert chat.choices[0].message.content
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="no-such-model", prompt=PROMPT)

    asyncio.run(ask())


def check_legacy_interface_of_the_module(served: Served) -> None:
    openai.base_url, openai.api_key = served.api + "/", served.key
    answer = openai.completions.create(model=served.model, prompt=PROMPT, **GREEDY)
    assert answer.choices[0].text

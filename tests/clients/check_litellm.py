"""litellm: the server as a custom endpoint of OpenAI's kind, whole, streamed, async, errors as its classes."""

import asyncio
from typing import Any

import litellm
import pytest

from tests.clients.served import PROMPT, Served

MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture
def endpoint(served: Served) -> dict[str, Any]:
    return {"api_base": served.api, "api_key": served.key, "num_retries": 0, "max_retries": 0}


@pytest.fixture(params=["openai", "hosted_vllm"])
def chat_model(request: pytest.FixtureRequest, served: Served) -> str:
    """Its two ways to a server of this kind."""
    return f"{request.param}/{served.model}"


@pytest.fixture
def text_model(served: Served) -> str:
    return f"text-completion-openai/{served.model}"


def check_chat(chat_model: str, endpoint: dict[str, Any]) -> None:
    answer = litellm.completion(chat_model, MESSAGES, **GREEDY, **endpoint)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def check_streamed_chat_is_the_whole_one(chat_model: str, endpoint: dict[str, Any]) -> None:
    whole = litellm.completion(chat_model, MESSAGES, **GREEDY, **endpoint)
    options = {"include_usage": True}
    chunks = list(
        litellm.completion(chat_model, MESSAGES, stream=True, stream_options=options, **GREEDY, **endpoint)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    assert built is not None
    assert built.choices[0].message.content == text
    assert built.usage.prompt_tokens == whole.usage.prompt_tokens


def check_logprobs_and_n(chat_model: str, endpoint: dict[str, Any]) -> None:
    answer = litellm.completion(
        chat_model, MESSAGES, logprobs=True, top_logprobs=2, n=2, **GREEDY, **endpoint
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 12
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def check_text_completion(text_model: str, endpoint: dict[str, Any]) -> None:
    answer = litellm.text_completion(PROMPT, model=text_model, logprobs=1, **GREEDY, **endpoint)
    assert answer.choices[0].text
    assert len(answer.choices[0].logprobs.tokens) == 12
    stream = litellm.text_completion(PROMPT, model=text_model, stream=True, **GREEDY, **endpoint)
    assert "".join(chunk.choices[0].text or "" for chunk in stream) == answer.choices[0].text


def check_sampling_fields_of_vllm(endpoint: dict[str, Any], served: Served) -> None:
    extra = {"top_k": 1, "ignore_eos": True}
    model = f"hosted_vllm/{served.model}"
    answer = litellm.completion(model, MESSAGES, max_tokens=12, extra_body=extra, **endpoint)
    greedy = litellm.completion(model, MESSAGES, **GREEDY, **endpoint)
    assert answer.choices[0].message.content == greedy.choices[0].message.content


def check_async(chat_model: str, endpoint: dict[str, Any]) -> None:
    async def ask() -> None:
        async def streamed() -> str:
            stream = await litellm.acompletion(chat_model, MESSAGES, stream=True, **GREEDY, **endpoint)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        texts = await asyncio.gather(*(streamed() for _ in range(8)))
        whole = await litellm.acompletion(chat_model, MESSAGES, **GREEDY, **endpoint)
        assert set(texts) == {whole.choices[0].message.content}

    asyncio.run(ask())


def check_errors(chat_model: str, endpoint: dict[str, Any], served: Served) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(chat_model, MESSAGES, temperature=-1, **endpoint)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(chat_model.replace(served.model, "no-such-model"), MESSAGES, **endpoint)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(chat_model, MESSAGES, **endpoint | {"api_key": "wrong"})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(chat_model, [{"role": "user", "content": "word " * 5000}], **endpoint)


def check_a_full_queue_is_a_rate_limit(text_model: str, endpoint: dict[str, Any], served: Served) -> None:
    prompts = [PROMPT] * served.capacity
    asked = {"max_tokens": 400, "extra_body": {"ignore_eos": True}, "stream": True}
    running = litellm.text_completion(PROMPT, model=text_model, **asked, **endpoint)
    next(iter(running))
    with pytest.raises(litellm.RateLimitError):
        litellm.text_completion(prompts, model=text_model, max_tokens=1, **endpoint)
    running.completion_stream.close()
    served.wait_until_idle()


def check_router(chat_model: str, endpoint: dict[str, Any]) -> None:
    router = litellm.Router([{"model_name": "ours", "litellm_params": {"model": chat_model, **endpoint}}])
    assert router.completion("ours", MESSAGES, **GREEDY).choices[0].message.content

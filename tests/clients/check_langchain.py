"""langchain-openai: ChatOpenAI and OpenAI, invoked, streamed, in batches, with log-probabilities, in a chain."""

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.served import PROMPT, Served

NUM_TOKENS = 12


@pytest.fixture
def settings(served: Served) -> dict[str, Any]:
    where = {"base_url": served.api, "api_key": served.key, "model": served.model}
    return {**where, "temperature": 0.0, "max_tokens": NUM_TOKENS, "max_retries": 0}


@pytest.fixture
def chat(settings: dict[str, Any]) -> ChatOpenAI:
    return ChatOpenAI(**settings)


@pytest.fixture
def llm(settings: dict[str, Any]) -> OpenAI:
    return OpenAI(**settings)


def check_chat(chat: ChatOpenAI) -> None:
    message = chat.invoke(PROMPT)
    assert isinstance(message, AIMessage)
    assert message.content
    assert message.response_metadata["finish_reason"] == "length"
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == NUM_TOKENS
    assert message.usage_metadata["total_tokens"] == message.usage_metadata["input_tokens"] + NUM_TOKENS


def check_conversation(chat: ChatOpenAI) -> None:
    messages = [SystemMessage("import os\n"), HumanMessage(PROMPT), AIMessage("):\n"), HumanMessage("    ")]
    assert chat.invoke(messages).content


def check_streamed_chat_is_the_whole_one(settings: dict[str, Any]) -> None:
    chat = ChatOpenAI(**settings, stream_usage=True)
    pieces = list(chat.stream(PROMPT))
    assert len(pieces) > 3
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert whole.content == chat.invoke(PROMPT).content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == NUM_TOKENS
    assert whole.response_metadata["finish_reason"] == "length"


def check_batch_is_what_each_gets_alone(chat: ChatOpenAI) -> None:
    prompts = [f"import os  # {number}\n" for number in range(12)]
    messages = chat.batch(prompts)
    assert [message.content for message in messages] == [chat.invoke(prompt).content for prompt in prompts]


def check_chat_logprobs(chat: ChatOpenAI) -> None:
    message = chat.bind(logprobs=True, top_logprobs=2).invoke(PROMPT)
    content = message.response_metadata["logprobs"]["content"]
    assert len(content) == NUM_TOKENS
    assert "".join(token["token"] for token in content) == message.content
    assert all(len(token["top_logprobs"]) == 2 for token in content)


def check_stop_and_n(settings: dict[str, Any], chat: ChatOpenAI) -> None:
    whole = str(chat.invoke(PROMPT).content)
    assert chat.invoke(PROMPT, stop=[whole[3:6]]).content == whole[: whole.index(whole[3:6])]
    several = ChatOpenAI(**settings, n=2).generate([[HumanMessage(PROMPT)]])
    assert [found.text for found in several.generations[0]] == [whole, whole]


def check_completion(llm: OpenAI) -> None:
    text = llm.invoke(PROMPT)
    assert text
    assert "".join(llm.stream(PROMPT)) == text
    result = llm.generate([PROMPT, "import os\n", PROMPT])
    assert [found[0].text for found in result.generations][::2] == [text, text]
    assert result.llm_output is not None
    assert result.llm_output["token_usage"]["completion_tokens"] == 3 * NUM_TOKENS


def check_completion_logprobs(settings: dict[str, Any]) -> None:
    result = OpenAI(**settings, logprobs=1).generate([PROMPT])
    info = result.generations[0][0].generation_info
    assert info is not None
    assert len(info["logprobs"]["token_logprobs"]) == NUM_TOKENS


def check_chains(chat: ChatOpenAI, llm: OpenAI) -> None:
    fields = {"name": "main"}
    chain = ChatPromptTemplate.from_messages([("human", "def {name}(")]) | chat | StrOutputParser()
    assert chain.invoke(fields) == (PromptTemplate.from_template("def {name}(") | llm).invoke(fields)


def check_async(chat: ChatOpenAI, llm: OpenAI) -> None:
    async def ask() -> None:
        texts = [message.content for message in await chat.abatch([PROMPT] * 8)]
        assert len(set(texts)) == 1
        assert "".join([str(piece.content) async for piece in chat.astream(PROMPT)]) == texts[0]
        assert await llm.ainvoke(PROMPT) == texts[0]

    asyncio.run(ask())


def check_sampling_fields_of_vllm(settings: dict[str, Any], chat: ChatOpenAI) -> None:
    hot = settings | {"temperature": 1.0, "extra_body": {"top_k": 1}}
    assert ChatOpenAI(**hot).invoke(PROMPT).content == chat.invoke(PROMPT).content


def check_errors(settings: dict[str, Any], chat: ChatOpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        chat.invoke(PROMPT, temperature=-1)
    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 5000)
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(**settings | {"model": "no-such-model"}).invoke(PROMPT)
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(**settings | {"api_key": "wrong"}).invoke(PROMPT)

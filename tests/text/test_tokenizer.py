"""Reading tokenizers and chat templates from a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged import chat_template
from jaxpaged.errors import CheckpointError, InvalidRequestError
from jaxpaged.tokenizer import Tokenizer
from tests.text.tokenizers_made_here import byte_level, byte_level_backend

TEMPLATE = """{% for message in messages %}
{{ '<|' + message['role'] + '|>' + message.content | trim }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
MESSAGES = [{"role": "user", "content": " Hi <b> "}, {"role": "assistant", "content": "é"}]


def folder_with(path: Path, **config: Any) -> Path:
    byte_level_backend().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert Tokenizer.from_path(tmp_path) is None


def test_special_tokens_and_round_trip(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_path(folder_with(tmp_path, eos_token={"content": "</s>"}, bos_token="<s>"))
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    text = "the cat 😀 日本 <tool call>"
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + text
    assert max(ids) < tokenizer.vocab_size


def test_special_tokens_from_the_older_file(tmp_path: Path) -> None:
    folder_with(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, 1)


def test_limits_left_in_the_file_do_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer is not None
    assert len(tokenizer.encode("q" * 100)) > 20
    assert len(tokenizer.encode("q")) == 2


@given(st.lists(st.integers(0, byte_level().vocab_size + 5), max_size=8))
def test_token_bytes_are_what_the_backend_decodes(token_ids: list[int]) -> None:
    joined = b"".join(byte_level().token_bytes(token_id) for token_id in token_ids)
    assert joined.decode(errors="replace") == byte_level().decode(token_ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"eos_token": '),
        ("tokenizer_config.json", '{"eos_token": 7}'),
        ("tokenizer_config.json", '{"chat_template": 7}'),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    folder_with(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        Tokenizer.from_path(tmp_path)


def test_invalid_unicode_is_a_users_mistake() -> None:
    with pytest.raises(InvalidRequestError, match="text="):
        byte_level().encode("a\ud800b")


def with_template(tmp_path: Path, template: Any = TEMPLATE) -> Tokenizer:
    folder = folder_with(tmp_path, chat_template=template, bos_token="<s>", eos_token="</s>")
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer is not None
    return tokenizer


def test_chat_template(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path)
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(MESSAGES) == "<|user|>Hi <b>\n<|assistant|>é\n<|assistant|>"
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False).endswith("é\n")


def test_templates_by_name_and_file(tmp_path: Path) -> None:
    tokenizer = with_template(
        tmp_path, [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    )
    assert tokenizer.apply_chat_template(MESSAGES) == "d"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}from file")
    reread = Tokenizer.from_path(tmp_path)
    assert reread is not None
    assert reread.apply_chat_template(MESSAGES) == "<s>from file"


def test_what_templates_expect_of_their_environment(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
        "{{ tools | tojson(indent=1) }}{{ strftime_now('%Y') | length }}{{ undefined_thing is defined }}"
    )
    text = with_template(tmp_path, template).apply_chat_template(MESSAGES, tools=[{"é": "<&>"}])
    assert text == '{"role": "user", "content": " Hi <b> "}[\n {\n  "é": "<&>"\n }\n]4False'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "the chat template of"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' * 10000000000 }}", "operand"),
        ("{{ 10 ** 10000000 }}", "operand"),
        ("{% for a in range(999999) %}{% endfor %}", "[Rr]ange"),
    ],
)
def test_hostile_and_failing_templates(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(InvalidRequestError, match=message):
        tokenizer.apply_chat_template(MESSAGES)


def test_endless_templates_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_SECONDS", 0.2)
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc")
    tokenizer = with_template(tmp_path, loops + "{% if messages[0] %}{% endif %}" + "{% endfor %}" * 3)
    with pytest.raises(InvalidRequestError, match=r"0\.2 seconds"):
        tokenizer.apply_chat_template(MESSAGES)


def test_size_of_the_prompt_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARS", 1000)
    tokenizer = with_template(tmp_path, "{% for a in range(99999) %}xxxxxxxxxxxxxxxxxxxxxx{% endfor %}")
    with pytest.raises(InvalidRequestError, match="1000 characters"):
        tokenizer.apply_chat_template(MESSAGES)


def test_a_template_that_does_not_parse(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{% for %}")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("messages", ["hi", [], ["hi"], [{"content": "x"}], [{"role": 3}], None])
def test_malformed_messages(tmp_path: Path, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="messages="):
        with_template(tmp_path).apply_chat_template(messages)


def test_only_known_arguments_reach_the_template(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="add_bos=True"):
        with_template(tmp_path).apply_chat_template(MESSAGES, add_bos=True)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        byte_level().apply_chat_template(MESSAGES)

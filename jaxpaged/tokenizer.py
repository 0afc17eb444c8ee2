"""Text to token ids and back, from a checkpoint's ``tokenizer.json``; no transformers needed."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from jaxpaged.chat_template import ChatTemplate
from jaxpaged.errors import CheckpointError, InvalidRequestError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """A checkpoint's tokenizer and chat template.

    vocab_size: ids below it have a token. eos_token_id, bos_token_id: None when the checkpoint names none.
    special_token_ids: what decoding leaves out with ``skip_special_tokens``. Safe to use from several
    threads. ``Tokenizer(backend)`` wraps a ``tokenizers.Tokenizer`` made in memory.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        eos_token: str | None = None,
        bos_token: str | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        from tokenizers import decoders

        # Limits that a training script left in the file would silently cut prompts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bos_token, self._eos_token = bos_token, eos_token
        self._chat_template = chat_template
        self.bos_token_id = None if bos_token is None else backend.token_to_id(bos_token)
        self.eos_token_id = None if eos_token is None else backend.token_to_id(eos_token)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        # Tokens of a byte-level vocabulary are byte strings: their texts can be put together without the
        # backend, token by token.
        self.is_byte_level = isinstance(backend.decoder, decoders.ByteLevel)
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_path(cls, folder: str | os.PathLike[str]) -> Self | None:
        """The tokenizer in a local checkpoint folder, or None when it holds no ``tokenizer.json``.

        Reads ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json`` and
        ``chat_template.jinja``. Raises CheckpointError naming the file that is malformed.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise CheckpointError(f"{path}: is not a valid tokenizer: {error}") from error
        config = {**_read_object(folder / "special_tokens_map.json")}
        config |= _read_object(folder / "tokenizer_config.json")
        return cls(
            backend,
            eos_token=_token_content(folder, config, "eos_token"),
            bos_token=_token_content(folder, config, "bos_token"),
            chat_template=_read_chat_template(folder, config),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        add_special_tokens: add BOS and the like where ``tokenizer.json`` says so; False for the text of
        ``apply_chat_template``, which spells them out. Raises InvalidRequestError for a text that is not
        valid Unicode (lone surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError("text", text, f"is not valid Unicode: {error.reason}") from error
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of some token ids; ids that have no token have no text."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token of a byte-level vocabulary stands for; empty for an id without a token."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id) or ""
            known = self._token_bytes[token_id] = _byte_level_bytes(token)
        return known

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can work."""
        return self._chat_template is not None

    def with_chat_template(self, path: str | os.PathLike[str]) -> Self:
        """The same tokenizer with the chat template in a file instead of its own.

        Raises CheckpointError when the file cannot be read.
        """
        changed = copy.copy(self)
        try:
            changed._chat_template = ChatTemplate(Path(path).read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return changed

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **arguments: Any
    ) -> str:
        """The prompt for a conversation, as the checkpoint's chat template writes it.

        messages: each a mapping with "role" and usually "content". arguments: those in
        ``chat_template.ALLOWED_ARGUMENTS``. Encode the result with ``add_special_tokens=False``. Raises
        InvalidRequestError when the template is missing or rejects the messages.
        """
        if self._chat_template is None:
            raise InvalidRequestError("messages", messages, "this checkpoint has no chat template")
        special = {"bos_token": self._bos_token or "", "eos_token": self._eos_token or ""}
        return self._chat_template.render(messages, special, add_generation_prompt, arguments)


def _byte_level_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for.

    Radford et al., "Language models are unsupervised multitask learners" (2019): bytes that print stand for
    themselves, the other ones take the characters from U+0100 on, in order.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printing)]
    alphabet = {chr(byte): byte for byte in printing}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # an added token written in plain text
        return token.encode()


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def _token_content(folder: Path, config: Mapping[str, Any], name: str) -> str | None:
    """A special token of the config, which is written as a string or as an object with its content."""
    value = config.get(name)
    content = value.get("content") if isinstance(value, dict) else value
    if content is not None and not isinstance(content, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {name}={value!r}: must be a token")
    return content


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return ChatTemplate(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: is not UTF-8: {error}") from error
    path = folder / "tokenizer_config.json"
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template={template!r:.80}: must be a template")
    return None if template is None else ChatTemplate(template, str(path))

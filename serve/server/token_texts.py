"""How single tokens are written in log-probabilities: their text, or their bytes where these are no text."""

from jaxpaged.tokenizer import Tokenizer


class TokenTexts:
    """Texts of tokens by id, each looked up once.

    A token that is only a part of a character has no text of its own: it is written ``bytes:\\xe2\\x96``, as in
    OpenAI's API. Without a tokenizer a token is written ``token_id:42``, as in vLLM's.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def text(self, token_id: int) -> str:
        """The token's text."""
        return self._look_up(token_id)[0]

    def utf8(self, token_id: int) -> list[int] | None:
        """The token's bytes."""
        return self._look_up(token_id)[1]

    def _look_up(self, token_id: int) -> tuple[str, list[int] | None]:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._describe(token_id)
        return found

    def _describe(self, token_id: int) -> tuple[str, list[int] | None]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return f"token_id:{token_id}", None
        if not tokenizer.is_byte_level:
            text = tokenizer.decode([token_id], skip_special_tokens=False)
            return text, list(text.encode())
        raw = tokenizer.token_bytes(token_id)
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)

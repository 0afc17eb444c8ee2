"""The prompt of the next turn, from all that was said."""

from jaxpaged.errors import InvalidRequestError
from jaxpaged.tokenizer import Tokenizer


class Conversation:
    """Messages of user and model, as a prompt for the model.

    With a chat template the whole conversation is rendered at each turn. Without one the turns are just one text
    that both write on, kept as token ids. Either way a prompt begins with the one before it, so that its
    blocks are found in the prefix cache.

    A turn is ``ask``, then ``answered`` or ``dropped``.
    """

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        if system is not None and not tokenizer.has_chat_template:
            raise InvalidRequestError("--system", system, "this checkpoint has no chat template")
        self._tokenizer = tokenizer
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system message."""
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._messages: list[dict[str, str]] = first
        self._token_ids: list[int] = []
        self._asked: list[int] = []

    @property
    def num_turns(self) -> int:
        """Questions that were answered."""
        return sum(message["role"] == "assistant" for message in self._messages)

    def ask(self, text: str) -> list[int]:
        """The prompt's token ids with what the user says now."""
        message = {"role": "user", "content": text}
        if self._tokenizer.has_chat_template:
            prompt = self._tokenizer.apply_chat_template([*self._messages, message])
            ids = self._tokenizer.encode(prompt, add_special_tokens=False)
        else:
            ids = self._token_ids + self._tokenizer.encode(text, add_special_tokens=not self._token_ids)
        self._messages.append(message)
        self._asked = ids
        return ids

    def answered(self, text: str, token_ids: list[int]) -> None:
        """The model's answer to what was asked last; an empty one counts too."""
        self._messages.append({"role": "assistant", "content": text})
        self._token_ids = self._asked + token_ids

    def dropped(self) -> None:
        """What was asked last got no answer and is forgotten."""
        self._messages.pop()

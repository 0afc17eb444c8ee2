"""Chat templates: a checkpoint's jinja2 source rendered in a sandbox, with bounded size and time."""

import datetime
import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jaxpaged.errors import CheckpointError, InvalidRequestError

# What a caller may hand to a template besides the messages.
ALLOWED_ARGUMENTS = frozenset(
    {"date_string", "documents", "enable_thinking", "reasoning_effort", "thinking", "tools"}
)
MAX_MESSAGES = 4096
MAX_PROMPT_CHARS = 1 << 24
MAX_RENDER_SECONDS = 5.0
MAX_OPERAND = 1 << 16


class ChatTemplate:
    """A chat template; its source is compiled at the first use.

    source: jinja2, written for the environment that Hugging Face's chat templates expect. origin: the file it
    is from, for error messages.
    """

    def __init__(self, source: str, origin: str) -> None:
        self._source = source
        self._origin = origin
        self._lock = threading.Lock()
        self._environment: _Sandbox | None = None
        self._template: jinja2.Template | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        add_generation_prompt: bool,
        arguments: Mapping[str, Any],
    ) -> str:
        """The prompt for ``messages``.

        Raises InvalidRequestError when the arguments are not allowed, the template rejects the messages or the
        prompt grows too long; CheckpointError when the template itself is malformed.
        """
        _check_messages(messages)
        for name, value in arguments.items():
            if name not in ALLOWED_ARGUMENTS:
                raise InvalidRequestError(name, value, f"is not one of {sorted(ALLOWED_ARGUMENTS)}")
        values = {
            **special_tokens,
            **arguments,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:  # the sandbox keeps one deadline
            environment, template = self._compiled()
            environment.deadline = time.monotonic() + MAX_RENDER_SECONDS
            try:
                return _joined(template.generate(values))
            except Exception as error:  # whatever Python raises when an expression meets the wrong type
                raise InvalidRequestError(
                    "messages", messages, f"the chat template of {self._origin} fails on them: {error}"
                ) from error

    def _compiled(self) -> "tuple[_Sandbox, jinja2.Template]":
        if self._environment is None or self._template is None:
            environment = _Sandbox()
            try:
                self._template = environment.from_string(self._source)
            except (jinja2.TemplateError, RecursionError) as error:
                raise CheckpointError(f"{self._origin}: malformed chat template: {error}") from error
            self._environment = environment
        return self._environment, self._template


class _TooExpensiveError(Exception):
    pass


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which also stops what takes too long.

    The deadline is looked at in every attribute, item, call and product, so in every loop that does anything.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        self.deadline = float("inf")
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _check_deadline(self) -> None:
        if time.monotonic() > self.deadline:
            raise _TooExpensiveError(f"it takes more than {MAX_RENDER_SECONDS:g} seconds")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._check_deadline()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._check_deadline()
        return super().getitem(obj, argument)

    # jinja2 names its parameters so that no keyword of a template's call can clash with them.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._check_deadline()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._check_deadline()
        if any(isinstance(value, int) and abs(value) > MAX_OPERAND for value in (left, right)):
            raise _TooExpensiveError(f"an operand of {operator} is above {MAX_OPERAND}")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks the assistant's text for training; skipped here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_messages(messages: object) -> None:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages", messages, "must be a list of messages")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidRequestError("messages", messages, f"must hold 1 to {MAX_MESSAGES} messages")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequestError("messages", message, "every message must be a mapping with a role")


def _joined(pieces: Any) -> str:
    kept = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > MAX_PROMPT_CHARS:
            raise _TooExpensiveError(f"the prompt has more than {MAX_PROMPT_CHARS} characters")
        kept.append(piece)
    return "".join(kept)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it: jinja2's own filter would escape <, >, & and ' for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

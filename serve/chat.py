"""``jaxpaged chat``: a conversation in the terminal."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console

from jaxpaged.errors import InvalidRequestError, PromptTooLongError
from jaxpaged.serve.conversation import Conversation
from jaxpaged.serve.interrupt import CatchInterrupt
from jaxpaged.serve.options import EngineOptions, SamplingOptions
from jaxpaged.serve.terminal import counted, seconds, stderr, stdout, waiting, write

if TYPE_CHECKING:
    from jaxpaged import CompletionOutput, Engine, RequestOutput, SamplingParams

MAX_TOKENS = 512
HELP = """\
/reset  begins a new conversation
/exit   leaves, as does Ctrl-D
Ctrl-C  interrupts an answer; Alt-Enter begins a new line"""


def run_chat(system: str | None, sampling: SamplingOptions, options: EngineOptions) -> None:
    """Reads questions and streams answers until /exit or the end of the input."""
    seed = {} if options.seed is None else {"seed": options.seed}
    params = sampling.params(max_tokens=MAX_TOKENS, **seed)
    if params.n != 1:
        raise InvalidRequestError("n", params.n, "a chat has one answer")
    with waiting("loading the model"):
        engine = options.open()
    with engine:
        if engine.tokenizer is None:
            raise ValueError(f"--model={options.model}: a chat needs a tokenizer.json, which is not there")
        chat = Chat(engine, params, Conversation(engine.tokenizer, system))
        chat.greet("the embedded model" if options.is_embedded else str(options.model))
        chat.run(_reader())


class Chat:
    """One conversation with an engine, over the process's own streams."""

    def __init__(self, engine: "Engine", params: "SamplingParams", conversation: Conversation) -> None:
        self._engine, self._params, self._conversation = engine, params, conversation
        self._console: Console = stdout()
        self._messages: Console = stderr()

    def greet(self, model: str) -> None:
        """Says who answers, on a terminal."""
        if self._messages.is_terminal:
            tokenizer = self._engine.tokenizer
            template = tokenizer is not None and tokenizer.has_chat_template
            kind = "" if template else ", which continues the text (no chat template)"
            self._note(f"{model}{kind} · /help /reset /exit")

    def run(self, read: Callable[[], str]) -> None:
        """Takes turns until ``read`` raises EOFError."""
        while True:
            try:
                line = read()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("/exit or Ctrl-D leaves")
                continue
            if line.strip() in ("/exit", "/quit"):
                return
            if line.lstrip().startswith("/"):
                self._command(line.strip())
            elif line:
                self._turn(line)

    def _note(self, text: str) -> None:
        self._messages.print(text, style="dim", markup=False, soft_wrap=True)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self._conversation.reset()
            self._note("a new conversation")
        elif line == "/help":
            self._note(HELP)
        else:
            self._note(f"{line} is no command\n{HELP}")

    def _turn(self, text: str) -> None:
        """One question and its answer; a question that cannot be answered is taken back."""
        try:
            prompt = self._conversation.ask(text)
        except ValueError as error:
            self._refuse(error)
            return
        try:
            answer, ids = self._answer(prompt)
        except PromptTooLongError as error:
            self._conversation.dropped()
            self._refuse(ValueError(f"{error}; /reset begins a new conversation"))
        except ValueError as error:
            self._conversation.dropped()
            self._refuse(error)
        else:
            self._conversation.answered(answer, ids)

    def _refuse(self, error: ValueError) -> None:
        self._messages.print(f"error: {error}", style="red", markup=False, soft_wrap=True)

    def _answer(self, prompt: list[int]) -> tuple[str, list[int]]:
        """Streams the answer; returns its text and tokens as far as they came."""
        begun = time.monotonic()
        pieces: list[str] = []
        ids: list[int] = []
        last: RequestOutput | None = None
        with CatchInterrupt() as interrupt, contextlib.ExitStack() as stack:
            stream = self._engine.stream({"prompt_token_ids": prompt}, self._params)
            stack.callback(stream.close)  # type: ignore[attr-defined]  # a generator: closing it aborts
            with waiting("waiting for the first token"):
                last = next(stream, None)
            while last is not None:
                completion: CompletionOutput = last.outputs[0]
                pieces.append(completion.text)
                ids += completion.token_ids
                write(self._console, completion.text)
                if interrupt.caught or (following := next(stream, None)) is None:
                    break
                last = following
        if not "".join(pieces).endswith("\n"):
            self._console.print()
        if last is not None:
            self._summarise(last, len(ids), begun, interrupted=interrupt.caught)
        return "".join(pieces), ids

    def _summarise(self, last: "RequestOutput", count: int, begun: float, *, interrupted: bool) -> None:
        if not self._messages.is_terminal or last.metrics is None:
            return
        first, end = last.metrics.first_token_time or begun, last.metrics.last_token_time or begun
        text = counted(count, "token")
        if end > first:
            text += f", {(count - 1) / (end - first):.0f} tokens/s"
        text += f", first after {seconds(first - begun)}"
        text += f", {last.num_cached_tokens} of {len(last.prompt_token_ids)} prompt tokens cached"
        self._note(("interrupted: " if interrupted else "") + text)


def _reader() -> Callable[[], str]:
    """Reads the next thing the user says: with editing and history on a terminal, else line by line."""
    return _line_editor() if sys.stdin.isatty() and sys.stdout.isatty() else _read_line


def _line_editor() -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import FormattedText
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(key_bindings=bindings)
    mark = FormattedText([("bold ansicyan", "> ")])
    return lambda: session.prompt(mark, prompt_continuation="  ")


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")

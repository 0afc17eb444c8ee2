"""``jaxpaged chat``: turns, commands, a real terminal, and Ctrl-C."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxpaged import CompletionOutput, RequestOutput, SamplingParams
from jaxpaged.errors import InvalidRequestError
from jaxpaged.serve.chat import Chat
from jaxpaged.serve.conversation import Conversation
from jaxpaged.serve.interrupt import CatchInterrupt
from jaxpaged.tokenizer import Tokenizer
from tests.serve.command_line import SMALL, make_checkpoint, run_small

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[me]{% endif %}"
)


def tokenizer_of(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_path(folder)
    assert tokenizer is not None
    return tokenizer


def test_without_a_template_a_prompt_begins_with_the_one_before(checkpoint: Path) -> None:
    tokenizer = tokenizer_of(checkpoint)
    talk = Conversation(tokenizer)
    first = talk.ask("def main(")
    assert first == tokenizer.encode("def main(")
    talk.answered("x):", [7, 8])
    second = talk.ask("\n    return")
    assert second == [*first, 7, 8, *tokenizer.encode("\n    return", add_special_tokens=False)]
    talk.dropped()
    assert talk.ask("\n    return") == second
    talk.reset()
    assert talk.ask("def main(") == first


def test_with_a_template_the_conversation_is_rendered(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(make_checkpoint(tmp_path / "chat", chat_template=TEMPLATE))
    talk = Conversation(tokenizer, system="be kind")
    talk.ask("hi")
    talk.answered("hello", [7])
    assert talk.num_turns == 1
    prompt = tokenizer.decode(talk.ask("bye"), skip_special_tokens=False)
    assert prompt == "[system]be kind[user]hi[assistant]hello[user]bye[me]"
    talk.reset()
    assert tokenizer.decode(talk.ask("hi")) == "[system]be kind[user]hi[me]"


def test_a_system_message_needs_a_template(checkpoint: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no chat template"):
        Conversation(tokenizer_of(checkpoint), system="be kind")


def test_a_scripted_conversation(checkpoint: Path) -> None:
    script = "the cat\n\n sat on\n/wrong\n/reset\nthe cat\n/exit\nnever read\n"
    result = run_small("chat", checkpoint, "-t", "0", "--max-tokens", "4", "--ignore-eos", stdin=script)
    assert "/wrong is no command" in result.stderr
    assert "a new conversation" in result.stderr
    again = run_small("chat", checkpoint, "-t", "0", "--max-tokens", "4", "--ignore-eos", stdin="the cat\n")
    assert result.stdout.startswith(again.stdout)
    assert result.stdout.endswith(again.stdout), "the answer after /reset is that of a new conversation"


def test_a_turn_that_does_not_fit_is_refused_and_forgotten(checkpoint: Path) -> None:
    script = "a b " * 300 + "\nthe cat\n"
    result = run_small("chat", checkpoint, "-t", "0", "--max-tokens", "4", stdin=script)
    assert "max_model_len=512" in result.stderr
    assert "/reset" in result.stderr
    alone = run_small("chat", checkpoint, "-t", "0", "--max-tokens", "4", stdin="the cat\n")
    assert result.stdout == alone.stdout


class EndlessEngine:
    """Answers without end; presses Ctrl-C after the third piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.prompts: list[list[int]] = []
        self.num_ended = 0

    def stream(self, prompt: dict[str, list[int]], params: SamplingParams) -> Iterator[RequestOutput]:
        self.prompts.append(prompt["prompt_token_ids"])
        try:
            for count in range(1000):
                if count == 3:
                    signal.raise_signal(signal.SIGINT)
                yield RequestOutput(
                    "r", None, self.prompts[-1], [CompletionOutput(0, "x", [9])], finished=False
                )
        finally:
            self.num_ended += 1


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tokenizer_of(checkpoint)
    engine: Any = EndlessEngine(tokenizer)
    lines = iter(["the cat", KeyboardInterrupt(), "the mat"])

    def read() -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    Chat(engine, SamplingParams(), Conversation(tokenizer)).run(read)
    shown = capsys.readouterr()
    assert shown.out == "xxxx\nxxxx\n"
    assert engine.num_ended == 2, "every answer that was cut ended its request"
    assert engine.prompts[1][: len(engine.prompts[0]) + 4] == [*engine.prompts[0], 9, 9, 9, 9]
    assert "/exit" in shown.err


def test_a_second_ctrl_c_goes_through() -> None:
    before = signal.getsignal(signal.SIGINT)
    with CatchInterrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.caught
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, *command: object) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120.0) -> None:
        """Until something new on the screen matches; forgets what was before."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"{pattern!r} did not come: {self.shown!r}"
            if select.select([self._master], [], [], 0.5)[0]:
                try:
                    self.shown += os.read(self._master, 4096).decode(errors="replace")
                except OSError:  # the process has ended
                    pytest.fail(f"{pattern!r} did not come: {self.shown!r}")
        self.shown = self.shown[match.end() :]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_a_chat_in_a_terminal(checkpoint: Path) -> None:
    command = (sys.executable, "-m", "jaxpaged.serve", "chat", "--model", checkpoint, *SMALL)
    terminal = Terminal(*command, "-t", "0", "--max-tokens", "3", "--ignore-eos")
    try:
        terminal.wait_for("no chat template")
        terminal.wait_for("> ")
        terminal.type("the cat sat on the mat, the cat sat\r")
        terminal.wait_for(r"3 tokens, .*0 of \d+ prompt tokens cached")
        terminal.wait_for("> ")
        terminal.type(" on the mat\r")
        terminal.wait_for(r"3 tokens, .*[1-9]\d* of \d+ prompt tokens cached")
        terminal.wait_for("> ")
        terminal.type("\x03")
        terminal.wait_for("/exit or Ctrl-D leaves")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()

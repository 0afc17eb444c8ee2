"""Where prompts come from on the command line: arguments, files, standard input."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

Prompt: TypeAlias = str | list[int] | dict[str, Any]


def read_prompts(arguments: Sequence[str] | None, files: Sequence[Path] | None) -> list[Prompt]:
    """Prompts of arguments and files in this order; of standard input when there are neither.

    A file is one prompt, without the newline at its end. Of a ``.jsonl`` file each line is one: a string, a list
    of token ids, or an object with "prompt" or "prompt_token_ids". "-" is standard input.

    Raises:
      ValueError: there is no prompt, or a line is malformed; the message says where.
    """
    prompts: list[Prompt] = list(arguments or ())
    for path in files or ():
        if path.suffix == ".jsonl":
            prompts += _json_lines(path)
        else:
            text = sys.stdin.read() if str(path) == "-" else _text(path)
            prompts.append(text.removesuffix("\n"))
    if not prompts:
        if sys.stdin.isatty():
            raise ValueError("no prompt: pass it as an argument, with --file FILE, or through a pipe")
        prompts.append(sys.stdin.read().removesuffix("\n"))
    return prompts


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file={path}: is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(f"--file={path}: cannot be read: {error.strerror}") from None


def _json_lines(path: Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"--file={path}, line {number}: is not JSON: {error}") from None
        if not isinstance(value, str | list | dict):
            raise ValueError(
                f"--file={path}, line {number}: {line:.40}: must be a string, a list of token ids or an object"
            )
        prompts.append(value)
    return prompts

"""Workload files: which prompts, and how many tokens to generate for each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = {"prompt", "out"}


@dataclass(frozen=True)
class WorkItem:
    """One request: text or token ids, and the exact number of tokens to generate."""

    prompt: str | list[int]
    out: int


def read_workload(path: Path, name: str | None = None) -> list[WorkItem]:
    """The requests in a workload file.

    The file is JSON: ``[{"prompt": [12, 7, ...], "out": 64}, {"prompt": "def f(", "out": 16}]``, or an object of
    such lists by name, of which ``name`` picks one; ``benchmarks/workloads.py`` writes that form.

    Raises:
      ValueError: the file is missing or malformed, or ``name`` does not go with it; the message says where.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"WORKLOAD={path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"WORKLOAD={path}: is not JSON: {error}") from None
    items = _pick(data, path, name)
    if not isinstance(items, list) or not items:
        raise ValueError(f'WORKLOAD={path}: must hold a list of {{"prompt": ..., "out": ...}}, not empty')
    return [_item(item, f"WORKLOAD={path}, request {at}") for at, item in enumerate(items)]


def _pick(data: Any, path: Path, name: str | None) -> Any:
    if not isinstance(data, dict):
        if name is not None:
            raise ValueError(f"--workload={name}: {path} holds one list without a name")
        return data
    names = ", ".join(map(str, data))
    if name is None and len(data) == 1:
        return next(iter(data.values()))
    if name is None:
        raise ValueError(f"WORKLOAD={path}: holds {names}: pick one with --workload")
    if name not in data:
        raise ValueError(f"--workload={name}: {path} holds {names}")
    return data[name]


def _item(item: Any, where: str) -> WorkItem:
    if not isinstance(item, dict) or set(item) != KEYS:
        raise ValueError(f'{where}: {item!r:.60}: must be an object with "prompt" and "out"')
    prompt, out = item["prompt"], item["out"]
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"{where}: prompt={prompt!r:.60}: must be text or token ids, not empty")
    if isinstance(out, bool) or not isinstance(out, int) or out < 1:
        raise ValueError(f"{where}: out={out!r:.60}: must be a positive integer")
    return WorkItem(prompt, out)

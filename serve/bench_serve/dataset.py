"""The requests to send: of a file, or random ones of given lengths."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.serve.bench_serve.options import NUM_RANDOM_PROMPTS, RANDOM, BenchServeOptions, Endpoint
from jaxpaged.serve.workload import KEYS, read_workload

FIRST_RANDOM_ID = 8  # most vocabularies begin with special tokens
DEFAULT_OUTPUT_LEN = 128
# Short English words: one token each, with the space before them, in most byte-pair vocabularies.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work government number night point "
    "home water room mother area money story fact month lot right study book eye job word business issue side "
    "kind head house service friend father power hour game line end member law car city community name"
)


@dataclass(frozen=True)
class BenchItem:
    """One request: text or token ids, and how many tokens to generate; None when the file does not say."""

    prompt: str | list[int]
    out: int | None


@dataclass(frozen=True)
class Dataset:
    """Requests to measure and requests to warm up with, which share no beginnings with the others."""

    name: str
    items: list[BenchItem]
    warmups: list[BenchItem]
    num_distinct: int

    def describe(self) -> dict[str, Any]:
        """What goes into the record."""
        return {"name": self.name, "requests": len(self.items), "distinct": self.num_distinct}


def make_dataset(options: BenchServeOptions, rng: np.random.Generator) -> Dataset:
    """The requests of the options.

    Raises:
      ValueError: the file is missing or malformed, or the endpoint cannot take its prompts.
    """
    if options.workload == RANDOM:
        count = options.num_prompts or NUM_RANDOM_PROMPTS
        items, warmups = (random_items(options, n, rng) for n in (count, options.num_warmups))
        return Dataset(RANDOM, items, warmups, count)
    path = Path(options.workload)
    read = read_dataset(path, options.name)
    for at, item in enumerate(read):
        if options.endpoint == Endpoint.CHAT and not isinstance(item.prompt, str):
            raise ValueError(f"WORKLOAD={path}, request {at}: --endpoint chat takes text, not token ids")
    if options.output_len is not None:
        read = [BenchItem(item.prompt, options.output_len) for item in read]
    count = options.num_prompts or len(read)
    items = [read[at % len(read)] for at in range(count)]
    warmups = [_reversed(read[at % len(read)]) for at in range(options.num_warmups)]
    name = path.name if options.name is None else f"{path.name} {options.name}"
    return Dataset(name, items, warmups, min(count, len(read)))


def random_items(options: BenchServeOptions, count: int, rng: np.random.Generator) -> list[BenchItem]:
    """Prompts of random token ids; for a chat of random words, about a token each, as no tokenizer is at hand.

    Lengths are uniform between (1 - ratio) and (1 + ratio) times the one that is asked for, both included; the
    common prefix comes on top.
    """
    inputs = _lengths(options.random_input_len, options.random_range_ratio, count, rng)
    outputs = _lengths(options.random_output_len, options.random_range_ratio, count, rng)
    as_words = options.endpoint == Endpoint.CHAT
    words = WORDS.split()
    low, high = (0, len(words)) if as_words else (FIRST_RANDOM_ID, options.random_vocab_size)
    prefix = rng.integers(low, high, options.random_prefix_len).tolist()
    items = []
    for num_in, num_out in zip(inputs, outputs, strict=True):
        ids = prefix + rng.integers(low, high, num_in).tolist()
        prompt = " ".join(words[i] for i in ids) if as_words else ids
        items.append(BenchItem(prompt, options.output_len or num_out))
    return items


def _lengths(mean: int, ratio: float, count: int, rng: np.random.Generator) -> list[int]:
    low, high = max(1, math.floor(mean * (1 - ratio))), math.ceil(mean * (1 + ratio))
    return rng.integers(low, high + 1, count).tolist()


def _reversed(item: BenchItem) -> BenchItem:
    """As long, but with another beginning, so that a warm-up leaves nothing in a prefix cache."""
    prompt = item.prompt
    return BenchItem(" ".join(prompt.split(" ")[::-1]) if isinstance(prompt, str) else prompt[::-1], item.out)


def read_dataset(path: Path, name: str | None = None) -> list[BenchItem]:
    """The requests of a workload file, or of a list or lines of objects with "prompt" and maybe "out".

    Of an object with "conversations", as in ShareGPT, the first turn is the prompt. Other keys are ignored.

    Raises:
      ValueError: the file is missing or malformed; the message says where.
    """
    where = f"WORKLOAD={path}"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{where}: cannot be read: {error.strerror}") from None
    if path.suffix == ".jsonl":
        if name is not None:
            raise ValueError(f"--workload={name}: {path} holds one list without a name")
        values = _lines(text, where)
    else:
        values = _parsed(text, where)
        is_list = isinstance(values, list) and name is None
        if not is_list or all(isinstance(value, dict) and set(value) == KEYS for value in values):
            return [BenchItem(item.prompt, item.out) for item in read_workload(path, name)]
    if not values:
        raise ValueError(f"{where}: holds no request")
    return [_item(value, f"{where}, request {at}") for at, value in enumerate(values)]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None


def _lines(text: str, where: str) -> list[Any]:
    numbered = enumerate(text.splitlines(), 1)
    return [_parsed(line, f"{where}, line {number}") for number, line in numbered if line.strip()]


def _item(value: Any, where: str) -> BenchItem:
    if not isinstance(value, dict):
        raise ValueError(f'{where}: {value!r:.60}: must be an object with "prompt"')
    prompt, out = value.get("prompt"), value.get("out")
    turns = value.get("conversations")
    if prompt is None and isinstance(turns, list) and turns and isinstance(turns[0], dict):
        prompt = turns[0].get("value")
    is_ids = isinstance(prompt, list) and all(type(i) is int for i in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise ValueError(f"{where}: prompt={prompt!r:.60}: must be text or token ids, not empty")
    if out is not None and (type(out) is not int or out < 1):
        raise ValueError(f"{where}: out={out!r:.60}: must be a positive integer")
    return BenchItem(prompt, out)

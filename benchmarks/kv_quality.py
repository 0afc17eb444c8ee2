"""What a quantised KV cache costs in quality: the embedded model on text that it has not seen, format by format.

    python benchmarks/kv_quality.py --out kv-quality.json

Everything goes through ``Engine``: keys and values are quantised as they are written, and read by the paged attention
of the engine's own programs. Weights and activations are float32 and attention is "xla" in every row, so that nothing
but ``kv_cache_dtype`` differs. (Over a bfloat16 pool "xla" also rounds the weights of the values to bfloat16.)

* Bits per byte: of the first tokens of held-out files, all but the first given those before it (``prompt_logprobs``).
* Agreement, teacher-forced: share of these positions at which the most likely next token is the baseline's.
* Agreement, free: greedy continuations of the beginnings of the files; the share of tokens before the first that is not
  the baseline's, and the share of continuations that are equal to the end.
* Bytes of the cache for each token, scales included.

The baseline is a bfloat16 cache. The text is the part of the standard library of the Python that runs this which the
model was not trained on, see ``models/embedded/corpus.py``.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged import Engine, RequestOutput, SamplingParams
from jaxpaged.models import embedded_model_path
from jaxpaged.models.embedded.corpus import load_corpus, standard_library
from jaxpaged.serve.environment import environment

BASELINE = "bfloat16"
# What users write, and how it is shown.
FORMATS: dict[str, str | list[str]] = {
    "bfloat16": "bfloat16",
    "float32": "float32",
    "fp8_e4m3": "fp8_e4m3",
    "int8": "int8",
    "int4": "int4",
    "int4, bfloat16 first and last": ["bfloat16", *["int4"] * 4, "bfloat16"],
    "int4, int8 first and last": ["int8", *["int4"] * 4, "int8"],
}
COLUMNS = (
    ("bits per byte", "bits_per_byte", "{:.4f}"),
    ("against bf16", "difference", "{:+.2%}"),
    ("same argmax", "argmax_agreement", "{:.2%}"),
    ("greedy tokens", "greedy_agreement", "{:.1%}"),
    ("whole texts", "greedy_identical", "{:.1%}"),
    ("bytes a token", "bytes_per_token", "{:,}"),
)


@dataclass(frozen=True)
class Texts:
    """Token ids: what is scored, the bytes of it, and what is continued."""

    scored: list[list[int]]
    num_bytes: int
    prompts: list[list[int]]


@dataclass(frozen=True)
class Found:
    """What one engine says: nats of all scored tokens, the likeliest token at each, continuations, and its cache."""

    nats: float
    likeliest: np.ndarray
    continued: list[list[int]]
    bytes_per_token: int


def read_texts(num_texts: int, num_tokens: int, num_prompts: int, prompt_tokens: int) -> Texts:
    """The first tokens of held-out files that are long enough, spread evenly over all of them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(embedded_model_path() / "tokenizer.json"))
    documents = load_corpus(standard_library()).held_out
    texts = [ids for ids in (tokenizer.encode(each.text).ids for each in documents) if len(ids) >= num_tokens]

    def spread(count: int) -> list[list[int]]:
        return [texts[at] for at in np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int)]

    scored = [ids[:num_tokens] for ids in spread(num_texts)]
    # A character of a byte-level token stands for a byte.
    num_bytes = sum(len(tokenizer.id_to_token(token)) for ids in scored for token in ids[1:])
    return Texts(scored, num_bytes, [ids[:prompt_tokens] for ids in spread(num_prompts)])


def measure(kv_cache_dtype: str | Sequence[str], texts: Texts, max_tokens: int, **arguments: Any) -> Found:
    """Scores and continues all texts in one engine."""
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    score = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    longest = max(len(ids) for ids in (*texts.scored, *texts.prompts))
    # Few programs: on a CPU compiling them is what takes the time.
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "num_scheduler_steps": 1, "max_logprobs": 1}
    sizes |= {"max_model_len": longest + max_tokens} | arguments
    with Engine(
        embedded_model_path(), dtype="float32", attention="xla", kv_cache_dtype=kv_cache_dtype, **sizes
    ) as engine:
        nats, likeliest = 0.0, []
        for output in engine.generate(texts.scored, score):
            own, best = _positions(output)
            nats -= own.sum()
            likeliest.append(best)
        continued = [output.outputs[0].token_ids for output in engine.generate(texts.prompts, greedy)]
        per_token = engine.memory_report().block // engine.config.block_size
        return Found(nats, np.concatenate(likeliest), continued, per_token)


def _positions(output: RequestOutput) -> tuple[np.ndarray, np.ndarray]:
    """Of every token but the first: its log-probability, and which token was the likeliest in its place."""
    own, best = [], []
    assert output.prompt_logprobs is not None, "asked for"
    for token, found in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert found is not None, "all but the first have one"
        own.append(found[token].logprob)
        best.append(next(other for other, candidate in found.items() if candidate.rank == 1))
    return np.array(own, np.float64), np.array(best)


def compare(found: Found, baseline: Found, num_bytes: int) -> dict[str, float | int]:
    """A row of the table."""
    pairs = list(zip(found.continued, baseline.continued, strict=True))
    same = [_common(one, other) / len(other) for one, other in pairs]
    return {
        "bits_per_byte": found.nats / math.log(2) / num_bytes,
        "difference": found.nats / baseline.nats - 1,
        "argmax_agreement": float((found.likeliest == baseline.likeliest).mean()),
        "greedy_agreement": float(np.mean(same)),
        "greedy_identical": float(np.mean([share == 1 for share in same])),
        "bytes_per_token": found.bytes_per_token,
    }


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def table(rows: dict[str, dict[str, float | int]]) -> str:
    """A line for each format."""
    lines = [f"{'kv_cache_dtype':<30}" + "".join(f"{title:>15}" for title, _, _ in COLUMNS)]
    for name, row in rows.items():
        lines.append(f"{name:<30}" + "".join(f"{text.format(row[key]):>15}" for _, key, text in COLUMNS))
    return "\n".join(lines)


def main() -> None:
    """Prints one table, writes one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=64, help="files that are scored")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens scored of each")
    parser.add_argument("--prompts", type=int, default=64, help="files that are continued")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a continuation")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    texts = read_texts(arguments.texts, arguments.tokens, arguments.prompts, arguments.prompt_tokens)
    rows: dict[str, dict[str, float | int]] = {}
    baseline = None
    for name, kv_cache_dtype in FORMATS.items():
        started = time.perf_counter()
        found = measure(kv_cache_dtype, texts, arguments.max_tokens)
        baseline = baseline or found
        rows[name] = compare(found, baseline, texts.num_bytes)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(table(rows))
    record = {
        "command": " ".join(["python", "benchmarks/kv_quality.py", *sys.argv[1:]]),
        "baseline": BASELINE,
        "scored_tokens": sum(len(ids) - 1 for ids in texts.scored),
        "scored_bytes": texts.num_bytes,
        "continuations": {"prompts": len(texts.prompts), "tokens": arguments.max_tokens},
        "rows": [{"name": name, "kv_cache_dtype": FORMATS[name], **row} for name, row in rows.items()],
        **environment(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Held-out bits per byte against n-grams: ``python -m jaxpaged.models.embedded.evaluate --run folder``.

Writes ``evaluation.json`` and ``loss.png`` into the run's folder and prints sample completions.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.models.checkpoint import load_model
from jaxpaged.models.decoder import Decoder
from jaxpaged.models.embedded.bpe import encode_all
from jaxpaged.models.embedded.chunked_attention import attend_in_chunks
from jaxpaged.models.embedded.corpus import load_corpus, standard_library
from jaxpaged.models.embedded.ngram import KneserNey

# None ends in a line break: the tokenizer joins it with the indentation that follows.
PROMPTS = (
    "def main(",
    "import os\nimport sys\n\n\ndef read_lines(path):",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "def is_even(n):\n    return",
    "for i in range(",
    "    try:\n        value = int(text)\n    except",
    "import unittest\n\n\nclass StackTest(unittest.TestCase):",
)


def model_nats(model: Decoder, stream: np.ndarray, *, window: int = 2048) -> float:
    """Negative log-likelihood in nats of every token of ``stream`` [T] but the first.

    Windows overlap by half, so that each token but the first ones sees between ``window // 2`` and ``window`` tokens.
    """

    @jax.jit
    def token_nats(tokens: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(model(tokens[None, :-1], attend=attend_in_chunks)[0])
        return -jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1)[:, 0]

    total, scored = 0.0, 1  # the first token is given
    while scored < len(stream):
        start = max(min(scored - window // 2, len(stream) - window - 1), 0)
        tokens = np.zeros(window + 1, np.int32)
        part = stream[start : start + window + 1]
        tokens[: len(part)] = part
        nats = np.asarray(token_nats(jnp.asarray(tokens)), np.float64)[: len(part) - 1]
        total += nats[scored - start - 1 :].sum()
        scored = start + len(part)
    return total


def complete(model: Decoder, tokenizer: Any, prompts: Sequence[str], max_tokens: int = 48) -> list[str]:
    """Greedy continuations, the whole sequence computed anew for each token."""
    logits = jax.jit(lambda tokens: model(tokens))
    texts = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt).ids
        tokens = np.zeros(len(ids) + max_tokens, np.int32)
        tokens[: len(ids)] = ids
        for position in range(len(ids), len(tokens)):
            tokens[position] = logits(jnp.asarray(tokens))[position - 1].argmax()
        texts.append(tokenizer.decode(tokens[len(ids) :].tolist()))
    return texts


def plot_losses(log: Path, picture: Path) -> None:
    """Draws a run's ``train.jsonl``."""
    import matplotlib.figure

    entries = [json.loads(line) for line in log.read_text().splitlines()]
    figure = matplotlib.figure.Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([e["step"] for e in entries], [e["loss"] for e in entries], linewidth=1, label="training")
    held_out = [e for e in entries if "held_out_loss" in e]
    axes.plot(
        [e["step"] for e in held_out], [e["held_out_loss"] for e in held_out], "o-", ms=3, label="held out"
    )
    axes.set(xlabel="step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=90)


def main() -> None:
    """The command line."""
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="the training run's output folder")
    arguments = parser.parse_args()
    model = load_model(arguments.run / "model", dtype=jnp.float32)
    tokenizer = Tokenizer.from_file(str(arguments.run / "model" / "tokenizer.json"))
    corpus = load_corpus(standard_library())
    train = np.concatenate(encode_all(tokenizer, [document.text for document in corpus.train]))
    held_out = np.concatenate(encode_all(tokenizer, [document.text for document in corpus.held_out]))
    num_bytes = sum(len(document.text.encode()) for document in corpus.held_out)

    def bits_per_byte(nats: float) -> float:
        return round(nats / math.log(2) / num_bytes, 4)

    report: dict[str, Any] = {"held_out_bytes": num_bytes, "held_out_tokens": len(held_out)}
    for order in range(1, 6):
        ngram = KneserNey(train, order=order, vocab_size=model.config.vocab_size)
        report[f"kneser_ney_{order}_bits_per_byte"] = bits_per_byte(-ngram.log_probs(held_out).sum())
    report["model_bits_per_byte"] = bits_per_byte(model_nats(model, held_out))
    (arguments.run / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    plot_losses(arguments.run / "train.jsonl", arguments.run / "loss.png")
    for prompt, text in zip(PROMPTS, complete(model, tokenizer, PROMPTS), strict=True):
        print("-" * 40 + f"\n{prompt}\u27ea{text}\u27eb")


if __name__ == "__main__":
    main()
